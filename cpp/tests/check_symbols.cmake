# Fails where an object file of an ISA level defines anything besides its tables for other files to see. A function that two
# levels both define, as templates and inline functions are, would be linked once, with the flags of whichever came first:
# AVX-512 code in the scalar level.
# Code that runs while the library is loaded, before anything has looked at the CPU, is refused for the same reason.
#   cmake -DNM=... "-DOBJECTS=...;..." -P check_symbols.cmake
foreach(object ${OBJECTS})
  execute_process(COMMAND "${NM}" -C --defined-only --extern-only "${object}" OUTPUT_VARIABLE symbols
                  COMMAND_ERROR_IS_FATAL ANY)
  string(STRIP "${symbols}" symbols)
  if(NOT symbols MATCHES "^[0-9a-f]+ [DR] halfbyte::[a-z0-9]+::[a-z_]+_table$")
    message(FATAL_ERROR "${object} must define one table of kernels and nothing else:\n${symbols}")
  endif()
  execute_process(COMMAND "${NM}" "${object}" OUTPUT_VARIABLE symbols COMMAND_ERROR_IS_FATAL ANY)
  if(symbols MATCHES "_GLOBAL__sub_I")
    message(FATAL_ERROR "${object} has a static initializer, which would run on every CPU")
  endif()
endforeach()
