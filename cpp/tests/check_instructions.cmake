# Fails where the code of object files matches an extended regular expression:
#   cmake -DOBJDUMP=... "-DOBJECTS=...;..." -DFORBIDDEN=... -P check_instructions.cmake
# grep, because CMake's own expressions take a minute for code of this size.
execute_process(COMMAND "${OBJDUMP}" -d --no-show-raw-insn ${OBJECTS} COMMAND grep -c "ret" OUTPUT_VARIABLE functions)
if(NOT functions GREATER 10)
  message(FATAL_ERROR "${OBJECTS} has next to no code: nothing was checked")
endif()
execute_process(COMMAND "${OBJDUMP}" -d --no-show-raw-insn ${OBJECTS} COMMAND grep -E -m 1 "${FORBIDDEN}"
                OUTPUT_VARIABLE found)
if(found)
  message(FATAL_ERROR "${OBJECTS} must not use this instruction: ${found}")
endif()
