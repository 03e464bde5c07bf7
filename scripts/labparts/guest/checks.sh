# For jobs in the test guest: `. /checks.sh`. Each result is one line on the console:
#   MARTLET-CHECK <name> ok|FAIL <detail>
# and `finish` ends the job with the number of failures.
failures=0
pass() { echo "MARTLET-CHECK $1 ok $2"; }
fail() { echo "MARTLET-CHECK $1 FAIL $2"; failures=$((failures + 1)); }
# equal NAME EXPECTED FOUND
equal() { if [ "$2" = "$3" ]; then pass "$1" "$3"; else fail "$1" "expected '$2', found '$3'"; fi; }
# succeeds NAME COMMAND...: its output is shown only if it fails
succeeds() {
  check=$1
  shift
  if output=$("$@" 2>&1); then pass "$check" ""; else fail "$check" "'$*' ended with $?: $(echo "$output" | tail -n 3 | tr '\n' '|')"; fi
}
# refused NAME COMMAND...: the command must fail
refused() {
  check=$1
  shift
  if output=$("$@" 2>&1); then fail "$check" "'$*' succeeded"; else pass "$check" "$(echo "$output" | tail -n 1)"; fi
}
# between NAME LOW HIGH VALUE
between() { if [ "$4" -ge "$2" ] && [ "$4" -le "$3" ]; then pass "$1" "$4"; else fail "$1" "$4 is not between $2 and $3"; fi; }
# disk SERIAL: the device name of the virtio disk with that serial
disk() { for one in /sys/block/vd*; do [ "$(cat $one/serial)" = "$1" ] && echo ${one##*/}; done; }
# card MAC: the name of the interface with that address
card() { for one in /sys/class/net/*; do [ "$(cat $one/address)" = "$1" ] && echo ${one##*/}; done; }
sum() { sha256sum "$@" | cut -d ' ' -f 1; }
# kernel_log: every message of the kernel of level warning or worse, for the other side to judge
kernel_log() { dmesg -r | awk '/^<[0-4]>/ { print "MARTLET-DMESG " $0 }'; }
finish() { exit $failures; }
