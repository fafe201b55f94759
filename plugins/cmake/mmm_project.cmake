# What every target shares: language, warnings, definitions, and how a library hides everything that it does not promise.

if(NOT CMAKE_BUILD_TYPE)
  set(CMAKE_BUILD_TYPE Release CACHE STRING "" FORCE)
endif()
set(CMAKE_CXX_FLAGS_RELEASE "-O3 -DNDEBUG")
set(CMAKE_SKIP_RPATH ON) # a library is found by its path, and needs nothing beside it
set(CMAKE_EXPORT_COMPILE_COMMANDS ON)
find_package(Threads REQUIRED)

# The version of the Python package: beside this folder in a checkout, above it in an installed package.
set(MMM_VERSION "" CACHE STRING "Version to report; empty reads it from the Python package")
if(NOT MMM_VERSION)
  foreach(file IN ITEMS ../src/mmm_export/__init__.py ../__init__.py)
    if(EXISTS ${CMAKE_CURRENT_SOURCE_DIR}/${file})
      file(STRINGS ${CMAKE_CURRENT_SOURCE_DIR}/${file} line REGEX "^__version__ = " LIMIT_COUNT 1)
      string(REGEX REPLACE ".*\"(.*)\".*" "\\1" MMM_VERSION "${line}")
      break()
    endif()
  endforeach()
endif()
if(NOT MMM_VERSION)
  set(MMM_VERSION "unknown")
endif()

if(MMM_CUDA)
  set(mmm_with_cuda 1)
  string(REPLACE ";" "," mmm_architectures "${MMM_CUDA_ARCHITECTURES}")
else()
  set(mmm_with_cuda 0)
  set(mmm_architectures "")
endif()
set(MMM_DEFINITIONS
  MMM_WITH_CUDA=${mmm_with_cuda} "MMM_VERSION=\"${MMM_VERSION}\"" "MMM_ARCHITECTURES=\"${mmm_architectures}\"")

# -ffile-prefix-map: no folder of the building machine gets into a library, and equal sources give equal bytes.
set(MMM_CXX_OPTIONS
  -Wall -Wextra -fvisibility=hidden -fvisibility-inlines-hidden "-ffile-prefix-map=${CMAKE_CURRENT_SOURCE_DIR}=plugins")

# mmm_compile(TARGET [INCLUDES folder...]): the includes are other people's headers, so their warnings are not shown.
function(mmm_compile target)
  cmake_parse_arguments(PARSE_ARGV 1 arg "" "" "INCLUDES")
  target_compile_features(${target} PRIVATE cxx_std_17)
  set_target_properties(${target} PROPERTIES CXX_EXTENSIONS OFF POSITION_INDEPENDENT_CODE ON)
  target_include_directories(${target} PRIVATE ${CMAKE_CURRENT_SOURCE_DIR}/include ${CMAKE_CURRENT_SOURCE_DIR})
  set(foreign ${arg_INCLUDES})
  if(MMM_CUDA)
    list(APPEND foreign ${MMM_CUDA_INCLUDE_DIR})
  endif()
  if(foreign)
    target_include_directories(${target} SYSTEM PRIVATE ${foreign})
  endif()
  target_compile_definitions(${target} PRIVATE ${MMM_DEFINITIONS})
  target_compile_options(${target} PRIVATE ${MMM_CXX_OPTIONS})
endfunction()

# mmm_link(TARGET): everything but libc inside, so that one binary runs on any distribution with a glibc that is new enough.
function(mmm_link target)
  target_link_options(${target} PRIVATE
    -static-libstdc++ -static-libgcc -Wl,--no-undefined -Wl,--as-needed -Wl,--gc-sections)
  if(MMM_CUDA)
    target_link_libraries(${target} PRIVATE ${MMM_CUDART_STATIC} Threads::Threads ${CMAKE_DL_LIBS} rt)
  endif()
endfunction()

# mmm_note(TARGET headers): a source file with the facts about a library that can be read without running it. They lie in an
# ELF note, which no linker drops: `mmm-export plugins inspect` and `readelf --notes` show it, whatever machine it is for.
file(STRINGS include/mmm/kernels.h abi_line REGEX "^#define MMM_ABI_VERSION " LIMIT_COUNT 1)
string(REGEX REPLACE "[^0-9]" "" mmm_abi "${abi_line}")
function(mmm_note target headers)
  set(cuda null)
  if(MMM_CUDA)
    set(cuda "\"${mmm_cuda_release}\"")
  endif()
  string(CONCAT note "{\"version\": \"${MMM_VERSION}\", \"abi\": ${mmm_abi}, \"cuda\": ${cuda}, "
    "\"architectures\": [${mmm_architectures}], \"compiler\": \"${CMAKE_CXX_COMPILER_ID} ${CMAKE_CXX_COMPILER_VERSION}\", "
    "\"headers\": \"${headers}\"}")
  string(REPLACE "\"" "\\\\\\\"" MMM_NOTE "${note}") # quoted twice: for C++, and for the assembler inside it
  configure_file(cmake/build_note.cpp.in ${CMAKE_CURRENT_BINARY_DIR}/${target}_note.cpp @ONLY)
endfunction()

# mmm_library(TARGET EXPORTS map [SOURCES file...] [INCLUDES folder...] [HEADERS words]): a shared library of core, kernels and
# an adapter; HEADERS names the foreign headers and their version.
function(mmm_library target)
  cmake_parse_arguments(PARSE_ARGV 1 arg "" "EXPORTS;HEADERS" "SOURCES;INCLUDES")
  set(map ${CMAKE_CURRENT_SOURCE_DIR}/${arg_EXPORTS})
  mmm_note(${target} "${arg_HEADERS}")
  add_library(${target} SHARED $<TARGET_OBJECTS:mmm_core> ${kernel_objects} ${arg_SOURCES}
    ${CMAKE_CURRENT_BINARY_DIR}/${target}_note.cpp)
  set_target_properties(${target} PROPERTIES LINKER_LANGUAGE CXX LINK_DEPENDS ${map})
  if(TARGET mmm_kernel_objects)
    add_dependencies(${target} mmm_kernel_objects)
  endif()
  mmm_compile(${target} INCLUDES ${arg_INCLUDES})
  mmm_link(${target})
  target_link_options(${target} PRIVATE "-Wl,--version-script=${map}" -Wl,--exclude-libs,ALL)
endfunction()
