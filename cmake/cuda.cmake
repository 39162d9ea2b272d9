# Finds nvcc, chooses the GPU architectures, and compiles csrc/cuda. The environment variable TORCH_CUDA_ARCH_LIST has
# the same format as for torch: "8.0;9.0;12.0+PTX", separated by semicolons or blanks; +PTX adds code that later GPUs
# compile when they load it. Sets CMAKE_CUDA_COMPILER and, if nvcc is usable, cuda_architectures and dlm_cuda_library();
# otherwise cuda_refused.
include(CheckLanguage)
set(CMAKE_CUDA_ARCHITECTURES OFF)  # set below: CMake cannot express all of them
# Check the version first: CMake reports an nvcc that is too old for the C++ compiler only as "not found".
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
  set(cuda_refused "${CMAKE_CUDA_COMPILER} is not an nvcc that runs here")
  return()
elseif(CMAKE_MATCH_1 VERSION_LESS 12.0)
  set(cuda_refused "nvcc ${CMAKE_MATCH_1} (${CMAKE_CUDA_COMPILER}) is too old: 12.0 or newer is needed")
  return()
endif()
set(nvcc ${CMAKE_CUDA_COMPILER})
unset(CMAKE_CUDA_COMPILER)
set(ENV{CUDACXX} ${nvcc})
check_language(CUDA)
if(NOT CMAKE_CUDA_COMPILER)
  set(cuda_refused "nvcc ${CMAKE_MATCH_1} (${nvcc}) does not work with ${CMAKE_CXX_COMPILER}, which may be too new \
for it: set CUDAHOSTCXX to an older C++ compiler")
  return()
endif()
set(CMAKE_CUDA_VISIBILITY_PRESET hidden)
set(CMAKE_CUDA_STANDARD 17)
set(CMAKE_CUDA_STANDARD_REQUIRED ON)
enable_language(CUDA)
find_package(CUDAToolkit REQUIRED)

# A100, RTX 30 and RTX 40; H100 and H200; B200 and B300; RTX 50 and later GPUs. No kernel needs instructions specific to
# one architecture: code without the suffix "a" also runs on later GPUs of the same major version. nvcc before 12.8
# supports only the first two.
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
    message(WARNING "dlmkernels: skipping ${item} of TORCH_CUDA_ARCH_LIST: the CUDA kernels need 8.0 or newer")
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
  message(FATAL_ERROR "TORCH_CUDA_ARCH_LIST names no architecture of 8.0 or newer; \
DLMKERNELS_CUDA=0 builds without CUDA kernels")
endif()

# Compiles every file of csrc/cuda/instantiations whose name begins with one of the ops, without torch's headers. The
# CUDA runtime is linked statically and looks for the driver only when first called, so the same build also loads on
# machines without a GPU.
function(dlm_cuda_library)
  set(sources "")
  foreach(op IN LISTS ARGN)
    file(GLOB found CONFIGURE_DEPENDS ${CMAKE_SOURCE_DIR}/csrc/cuda/instantiations/${op}*.cu)
    list(APPEND sources ${found})
  endforeach()
  add_library(dlm_cuda OBJECT ${sources})
  target_link_libraries(dlm_cuda PRIVATE dlm_flags PUBLIC CUDA::cudart_static)
  # Register spills are kernel bugs and should be reported. Contraction stays enabled, see common/exact.h.
  target_compile_options(dlm_cuda PRIVATE $<$<COMPILE_LANGUAGE:CUDA>:-lineinfo
    -Xcompiler=-Wall,-ffile-prefix-map=${CMAKE_SOURCE_DIR}/=
    -Xptxas=-v,--warn-on-spills,--warn-on-local-memory-usage
    $<$<BOOL:${DLMKERNELS_WERROR}>:-Werror=all-warnings>>)
  set_source_files_properties(${sources} PROPERTIES COMPILE_OPTIONS "${gencode}")
  set_target_properties(dlm_cuda PROPERTIES
    CUDA_COMPILER_LAUNCHER "${Python_EXECUTABLE};${CMAKE_SOURCE_DIR}/cmake/ptxas_report.py")
endfunction()
