# Toolchain file: compile on x86-64 for a Jetson or another 64-bit Arm machine with Linux.
# CUDA headers are the same for both; libcudart_static.a is not and comes from MMM_CUDART_STATIC.
set(CMAKE_SYSTEM_NAME Linux)
set(CMAKE_SYSTEM_PROCESSOR aarch64)

find_program(MMM_AARCH64_CXX NAMES aarch64-linux-gnu-g++ aarch64-linux-gnu-g++-14 aarch64-linux-gnu-g++-13
  aarch64-linux-gnu-g++-12 aarch64-linux-gnu-g++-11)
if(NOT MMM_AARCH64_CXX)
  message(FATAL_ERROR "no compiler for aarch64 was found; install g++-aarch64-linux-gnu, or set MMM_AARCH64_CXX")
endif()
set(CMAKE_CXX_COMPILER ${MMM_AARCH64_CXX})

set(CMAKE_FIND_ROOT_PATH_MODE_PROGRAM NEVER)
set(CMAKE_FIND_ROOT_PATH_MODE_LIBRARY ONLY)
set(CMAKE_FIND_ROOT_PATH_MODE_INCLUDE ONLY)
