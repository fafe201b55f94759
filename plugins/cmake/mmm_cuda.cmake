# nvcc: where it is, what it links, and how one .cu file becomes one object with machine code for each architecture.

find_program(MMM_NVCC nvcc HINTS $ENV{CUDA_HOME}/bin $ENV{CUDA_PATH}/bin PATHS /usr/local/cuda/bin)
if(MMM_NVCC)
  # A wrapper script on the PATH says nothing about where the toolkit lies; nvcc itself does.
  execute_process(COMMAND ${MMM_NVCC} --dryrun -x cu -c /dev/null -o /dev/null ERROR_VARIABLE dryrun OUTPUT_QUIET)
  string(REGEX MATCH "#\\$ TOP=([^\n]+)" found "${dryrun}")
  get_filename_component(mmm_toolkit "${CMAKE_MATCH_1}" ABSOLUTE)
  execute_process(COMMAND ${MMM_NVCC} --version OUTPUT_VARIABLE said)
  string(REGEX MATCH "release ([0-9.]+)" found "${said}")
  set(mmm_cuda_release "${CMAKE_MATCH_1}")
endif()

if(NOT MMM_CUDA_INCLUDE_DIR) # TensorRT's headers include it, so a build without kernels may need it too
  unset(MMM_CUDA_INCLUDE_DIR CACHE)
  find_path(MMM_CUDA_INCLUDE_DIR cuda_runtime_api.h
    HINTS ${mmm_toolkit}/include ${mmm_toolkit}/targets/${CMAKE_SYSTEM_PROCESSOR}-linux/include
    PATHS /usr/local/cuda/include NO_CMAKE_FIND_ROOT_PATH)
endif()
if(MMM_TENSORRT_INCLUDE_DIR AND NOT MMM_CUDA_INCLUDE_DIR)
  message(FATAL_ERROR "TensorRT's headers include cuda_runtime_api.h, which was not found; set MMM_CUDA_INCLUDE_DIR")
endif()

if(MMM_CUDA)
  if(NOT MMM_NVCC)
    message(FATAL_ERROR "nvcc was not found; set MMM_NVCC, or MMM_CUDA=OFF for the CPU reference alone")
  endif()
  string(REPLACE "," ";" MMM_CUDA_ARCHITECTURES "${MMM_CUDA_ARCHITECTURES}")
  if(NOT MMM_CUDA_ARCHITECTURES)
    message(FATAL_ERROR "MMM_CUDA_ARCHITECTURES is empty; set it to compute capabilities such as 87,90")
  endif()
  if(NOT MMM_CUDART_STATIC)
    unset(MMM_CUDART_STATIC CACHE)
    find_library(MMM_CUDART_STATIC libcudart_static.a
      HINTS ${mmm_toolkit}/targets/${CMAKE_SYSTEM_PROCESSOR}-linux/lib ${mmm_toolkit}/lib64 ${mmm_toolkit}/lib
      NO_CMAKE_FIND_ROOT_PATH)
    if(NOT MMM_CUDART_STATIC)
      message(FATAL_ERROR "libcudart_static.a for ${CMAKE_SYSTEM_PROCESSOR} was not found; set MMM_CUDART_STATIC")
    endif()
  endif()
endif()

# mmm_compile_cuda(VARIABLE file...): put the objects of .cu files into VARIABLE.
function(mmm_compile_cuda variable)
  set(flags -std=c++17 -O3 --threads ${MMM_NVCC_THREADS} -ccbin ${CMAKE_CXX_COMPILER} -cudart static
    -Xcompiler=-fPIC,-fvisibility=hidden,-fvisibility-inlines-hidden,-Wall,-Wextra
    -I${CMAKE_CURRENT_SOURCE_DIR}/include -I${CMAKE_CURRENT_SOURCE_DIR})
  if(CMAKE_CROSSCOMPILING) # nvcc would look in its folder for the other machine, which few toolkits have
    list(APPEND flags -I${MMM_CUDA_INCLUDE_DIR})
  endif()
  foreach(definition IN LISTS MMM_DEFINITIONS)
    list(APPEND flags -D${definition})
  endforeach()
  foreach(architecture IN LISTS MMM_CUDA_ARCHITECTURES)
    set(target ${architecture})
    if(architecture EQUAL 90) # the matrix units of a warpgroup exist on 9.0 alone, under a name of their own
      set(target 90a)
    endif()
    list(APPEND flags -gencode arch=compute_${target},code=sm_${target})
  endforeach()
  set(objects "")
  foreach(source IN LISTS ARGN)
    get_filename_component(name ${source} NAME)
    set(object ${CMAKE_CURRENT_BINARY_DIR}/kernels/${name}.o)
    add_custom_command(OUTPUT ${object}
      COMMAND ${CMAKE_COMMAND} -E make_directory ${CMAKE_CURRENT_BINARY_DIR}/kernels
      COMMAND ${MMM_NVCC} ${flags} -MD -MT ${object} -MF ${object}.d -c ${source} -o ${object}
      DEPENDS ${source} DEPFILE ${object}.d COMMENT "Compiling ${name}" VERBATIM)
    list(APPEND objects ${object})
  endforeach()
  set_source_files_properties(${objects} PROPERTIES EXTERNAL_OBJECT TRUE GENERATED TRUE)
  # One target makes them: several libraries built side by side would each run the same commands under make.
  add_custom_target(mmm_kernel_objects DEPENDS ${objects})
  set(${variable} ${objects} PARENT_SCOPE)
endfunction()
