# Builds _C for every interpreter in DLMKERNELS_PYTHONS (by default the one that runs the build). Only the interpreter's
# headers are needed. Sets `bindings` to the list of targets.
if(NOT DLMKERNELS_PYTHONS)
  set(DLMKERNELS_PYTHONS ${Python_EXECUTABLE})
endif()
execute_process(COMMAND ${Python_EXECUTABLE} -c "import pybind11; print(pybind11.get_include(), end='')"
                OUTPUT_VARIABLE pybind11_include RESULT_VARIABLE pybind11_missing)
if(pybind11_missing)
  message(FATAL_ERROR "${Python_EXECUTABLE} has no pybind11: ${Python_EXECUTABLE} -m pip install pybind11")
endif()

set(bindings "")
foreach(python IN LISTS DLMKERNELS_PYTHONS)
  execute_process(COMMAND ${python} ${CMAKE_SOURCE_DIR}/cmake/find_python.py
                  OUTPUT_VARIABLE found RESULT_VARIABLE failed ERROR_VARIABLE python_message)
  if(failed)
    message(FATAL_ERROR "DLMKERNELS_PYTHONS: ${python}: ${python_message}")
  endif()
  list(GET found 1 suffix)
  list(GET found 2 include)
  string(MAKE_C_IDENTIFIER "_C${suffix}" target)
  add_library(${target} MODULE csrc/torch/module.cpp)
  target_include_directories(${target} SYSTEM PRIVATE ${pybind11_include} ${include})
  target_link_libraries(${target} PRIVATE dlm_flags dlmkernels)
  target_link_options(${target} PRIVATE -Wl,--exclude-libs,ALL
    -Wl,--version-script=${CMAKE_SOURCE_DIR}/cmake/exports.map)
  set_target_properties(${target} PROPERTIES PREFIX "" OUTPUT_NAME _C SUFFIX ${suffix}
    BUILD_WITH_INSTALL_RPATH ON INSTALL_RPATH "$ORIGIN" LINK_DEPENDS ${CMAKE_SOURCE_DIR}/cmake/exports.map)
  list(APPEND bindings ${target})
endforeach()
