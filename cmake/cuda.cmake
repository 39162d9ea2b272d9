# Finds nvcc, chooses the GPU architectures, and compiles csrc/cuda. TORCH_CUDA_ARCH_LIST, in the environment, is read
# as torch reads it: "8.0;9.0;12.0+PTX", by semicolons or blanks; +PTX adds code that later GPUs translate when they
# load it. Sets CMAKE_CUDA_COMPILER and, unless nvcc is refused, cuda_architectures and dlm_cuda_library().
include(CheckLanguage)
set(CMAKE_CUDA_ARCHITECTURES OFF)  # written out below: CMake has no notation for all of them
# Asked for its version first: CMake only says "not found" of an nvcc that is too old for the C++ compiler.
if(NOT CMAKE_CUDA_COMPILER)
  set(CMAKE_CUDA_COMPILER $ENV{CUDACXX})
endif()
if(NOT CMAKE_CUDA_COMPILER)
  find_program(DLM_NVCC nvcc HINTS $ENV{CUDA_HOME}/bin NO_CACHE NO_CMAKE_SYSTEM_PATH)
  if(NOT DLM_NVCC)
    unset(CMAKE_CUDA_COMPILER)
    return()
  endif()
  set(CMAKE_CUDA_COMPILER ${DLM_NVCC})
endif()
execute_process(COMMAND ${CMAKE_CUDA_COMPILER} --version OUTPUT_VARIABLE nvcc_says RESULT_VARIABLE nvcc_failed ERROR_QUIET)
string(REGEX MATCH "release ([0-9]+\\.[0-9]+)" nvcc_release "${nvcc_says}")
if(nvcc_failed OR NOT nvcc_release)
  set(cuda_refused "${CMAKE_CUDA_COMPILER} is no nvcc that runs here")
  return()
elseif(CMAKE_MATCH_1 VERSION_LESS 12.0)
  set(cuda_refused "nvcc ${CMAKE_MATCH_1} found (${CMAKE_CUDA_COMPILER}), 12.0 or newer needed")
  return()
endif()
set(nvcc ${CMAKE_CUDA_COMPILER})
unset(CMAKE_CUDA_COMPILER)
set(ENV{CUDACXX} ${nvcc})
check_language(CUDA)
if(NOT CMAKE_CUDA_COMPILER)
  set(cuda_refused "nvcc ${CMAKE_MATCH_1} (${nvcc}) compiles nothing with ${CMAKE_CXX_COMPILER}, which may be too new \
for it: set CUDAHOSTCXX to an older C++ compiler")
  return()
endif()
set(CMAKE_CUDA_VISIBILITY_PRESET hidden)
set(CMAKE_CUDA_STANDARD 17)
set(CMAKE_CUDA_STANDARD_REQUIRED ON)
enable_language(CUDA)
find_package(CUDAToolkit REQUIRED)

# A100 and RTX 30 and 40; H100, H200; B200, B300; RTX 50 and what comes later. No kernel needs an instruction of one
# architecture alone: code without the suffix "a" also runs on the later GPUs of the same number before the point. Older
# nvcc knows the first two.
if(NOT "$ENV{TORCH_CUDA_ARCH_LIST}" STREQUAL "")
  string(REGEX REPLACE "[ ,;]+" ";" wanted "$ENV{TORCH_CUDA_ARCH_LIST}")
elseif(CMAKE_CUDA_COMPILER_VERSION VERSION_LESS 12.8)
  set(wanted 8.0 9.0+PTX)
else()
  set(wanted 8.0 9.0 10.0 12.0+PTX)
endif()

set(gencode "")
set(cuda_architectures "")
foreach(item IN LISTS wanted)
  if(NOT item MATCHES "^([0-9]+)\\.([0-9])([af]?)(\\+PTX)?$")
    message(FATAL_ERROR "TORCH_CUDA_ARCH_LIST must hold architectures like 8.0, 9.0 or 12.0+PTX; got '${item}'")
  endif()
  set(number "${CMAKE_MATCH_1}${CMAKE_MATCH_2}${CMAKE_MATCH_3}")
  if(CMAKE_MATCH_1 LESS 8)
    message(WARNING "dlmkernels: TORCH_CUDA_ARCH_LIST names ${item}; the CUDA kernels need 8.0 or newer: left out")
    continue()
  endif()
  list(APPEND gencode "-gencode=arch=compute_${number},code=sm_${number}")
  if(CMAKE_MATCH_4)
    list(APPEND gencode "-gencode=arch=compute_${number},code=compute_${number}")
  endif()
  string(APPEND cuda_architectures " ${item}")
endforeach()
string(STRIP "${cuda_architectures}" cuda_architectures)
if(NOT gencode)
  message(FATAL_ERROR "TORCH_CUDA_ARCH_LIST leaves no architecture of 8.0 or newer; DLMKERNELS_CUDA=0 builds without")
endif()

# Every file of csrc/cuda/instantiations whose name begins with one of the ops. Torch's headers are not on the path.
# The CUDA runtime is linked in, and it looks for the driver only when first called: one build loads anywhere.
function(dlm_cuda_library)
  set(sources "")
  foreach(op IN LISTS ARGN)
    file(GLOB found CONFIGURE_DEPENDS ${CMAKE_SOURCE_DIR}/csrc/cuda/instantiations/${op}*.cu)
    list(APPEND sources ${found})
  endforeach()
  add_library(dlm_cuda OBJECT ${sources})
  target_link_libraries(dlm_cuda PRIVATE dlm_flags PUBLIC CUDA::cudart_static)
  # Spilled registers are a fault of the kernel, to be seen; contraction stays on, see common/exact.h.
  target_compile_options(dlm_cuda PRIVATE $<$<COMPILE_LANGUAGE:CUDA>:-lineinfo
    -Xcompiler=-Wall,-ffile-prefix-map=${CMAKE_SOURCE_DIR}/=
    -Xptxas=-v,--warn-on-spills,--warn-on-local-memory-usage
    $<$<BOOL:${DLMKERNELS_WERROR}>:-Werror=all-warnings>>)
  set_source_files_properties(${sources} PROPERTIES COMPILE_OPTIONS "${gencode}")
  set_target_properties(dlm_cuda PROPERTIES
    CUDA_COMPILER_LAUNCHER "${Python_EXECUTABLE};${CMAKE_SOURCE_DIR}/cmake/ptxas_report.py")
endfunction()
