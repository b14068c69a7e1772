#!/usr/bin/env bash
# Remakes every table and figure of results.md: docs/results.sh PREFMW FOLDER. Killed and started again, it goes on.
# Strengths come from the runs on the development split; what is said of them stands in results.md.
set -euo pipefail
prefmw=$1
runs=$2
docs=$(dirname "$0")
mkdir -p "$runs" "$docs/figures"
export PREFMW_HOME="$runs/home" # nobody's calibrations, nobody's settings
measure() { # NAME COMMAND...: one run, and its figure among the document's, where that shows it
  local name=$1
  shift
  echo "$(date +%H:%M:%S) $name"
  "$prefmw" eval "$@" --out "$runs/$name" > /dev/null
  local figure="$runs/$name/figure.png" # there is none without matplotlib
  if [ -f "$figure" ] && grep -q "figures/$name.png" "$docs/results.md"; then cp "$figure" "$docs/figures/$name.png"; fi
}

sweep="--strength 0 --strength 0.5 --strength 1 --strength 2 --strength 3"
measure steer-dev-linear steer --split dev --methods none,prompt,linear $sweep --strength 5 --no-controls --n 16
measure steer-dev-pad steer --split dev --methods none,prompt,pad $sweep --no-controls --n 16
measure steer-test steer --split test --methods none,prompt,linear,pad --strength 1 --n 40 --second-opinion
measure dials-test dials --split test --n 16
measure control control --split test --n 200
everybody="--by likelihood --everybody"
measure choice-dev choice --split dev --data composed --n 24 $everybody --methods none,prompt,linear --ratios 0,0.5,1,2,3,5,10 --no-controls
measure choice-test choice --split test --data composed --n 34 $everybody --methods none,prompt,linear,pad
measure choice-shipped-dev choice --split dev $everybody --methods none,prompt,linear --ratios 0,1,2,5,10 --no-controls
measure choice-shipped choice --split test --n 40 $everybody --methods none,prompt,linear --ratios 10
measure choice-letter choice --split test --by letter --methods none,prompt,linear,pad
measure rewards-test rewards --split test --methods none,prompt,linear,pad --strength 1 --n 8 --judge oracle
measure choices choices
measure inference inference "$docs/../tests/preferences/statements.jsonl"

# The picture that leads the README: one question, one seed, three people, in an empty store.
rm -f "$PREFMW_HOME"/prefmw.db*
question="How do I fall asleep faster?"
"$prefmw" users add alice --persona "a nurse on night shifts who reads on her phone and wants only the essentials" > /dev/null
"$prefmw" users add bob --persona "a retired teacher who loves long explanations and a good joke" > /dev/null
"$prefmw" prefs set bob humor=1 friendliness=1 verbosity=1 > /dev/null
"$prefmw" users add carol --persona "a physician who writes guidelines" > /dev/null
"$prefmw" prefs set carol complexity=1 formality=1 > /dev/null
for user in alice bob carol; do "$prefmw" chat "$question" --user $user --seed 4 > /dev/null; done
"$prefmw" why --user alice --user bob --user carol --out "$docs/figures/why.svg"

"$prefmw" eval report "$runs" --out "$docs/results.md"
"$prefmw" eval report "$runs"
