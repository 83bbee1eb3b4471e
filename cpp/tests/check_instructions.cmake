# Fails where the code of an object file matches a regular expression:
#   cmake -DOBJDUMP=... -DOBJECT=... -DFORBIDDEN=... -P check_instructions.cmake
execute_process(COMMAND "${OBJDUMP}" -d --no-show-raw-insn "${OBJECT}" OUTPUT_VARIABLE code COMMAND_ERROR_IS_FATAL ANY)
string(REGEX MATCH "[^\n]*(${FORBIDDEN})[^\n]*" found "${code}")
string(LENGTH "${code}" length)
if(length LESS 10000)
  message(FATAL_ERROR "${OBJECT} has next to no code: nothing was checked")
endif()
if(found)
  message(FATAL_ERROR "${OBJECT} must not use this instruction: ${found}")
endif()
