# shellcheck shell=bash disable=SC2034
# What the stand-ins share. $STAND_IN is the folder of a test: they append their calls to NAME.calls there, one a line,
# quoted for a shell, and take their answers from files that the test wrote.

record() {
  local text=
  printf -v text ' %q' "$@"
  echo "${text# }" >> "$STAND_IN/${0##*/}.calls"
}

# Sets $answer to the first line of a file and takes it away; the last one stays. $2 where there is no such file.
next_answer() {
  answer="${2:-}"
  if ! [ -s "$STAND_IN/$1" ]; then return; fi
  answer="$(head -n 1 "$STAND_IN/$1")"
  if [ "$(wc -l < "$STAND_IN/$1")" -gt 1 ]; then
    sed -i 1d "$STAND_IN/$1"
  fi
}
