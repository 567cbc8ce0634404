#!/usr/bin/env bash
# Downloads Llama 2, Code Llama and Llama 3 checkpoints through the signed URL from Meta's e-mail.
# Needs bash 3.2 or newer, curl or GNU wget, and md5sum or md5; see --help.

# -f: a signed URL holds a `*`, and nothing here wants a file name pattern.
set -euf -o pipefail

# The messages of wget and the numbers of awk are read below, so they must not depend on the user.
export LC_ALL=C

url=${LLAMA_URL-}
family=${LLAMA_FAMILY-}
models=${LLAMA_MODELS-}
dir=${LLAMA_DIR:-.}
stall_seconds=${LLAMA_STALL_SECONDS:-60}

# curl and wget would inherit it, and have no use for it.
unset LLAMA_URL

task=download
selected=''  # the folders to fetch, separated by spaces
scratch=''   # a private folder for what curl and wget report
lock=''      # the folder whose existence keeps a second download out

usage() {
  cat <<'END'
Usage: download.sh [options]

Downloads Llama 2, Code Llama or Llama 3.x checkpoints. Asks for the signed URL
from the e-mail and for the models where no option or variable gives them.
Started again, it resumes what is partial and skips what is complete.

  --url URL        the signed URL, in quotes             (or LLAMA_URL)
  --family NAME    llama-2, CodeLlama, Llama-3, Llama-3.1,
                   Llama-3.2 or Llama-3.3                (or LLAMA_FAMILY)
  --models LIST    comma-separated, or all               (or LLAMA_MODELS)
                   folder names, as in llama-2-7b,llama-2-13b-chat;
                   with --family also short, as in 7B,13B-chat
                   or, for each Llama-3, 8B,70B-Instruct
  --dir DIR        where to put them, default .          (or LLAMA_DIR)
  --dry-run        print what would be fetched
  --list           print the models and their sizes
  --verify DIR     compare what is in DIR with its checklists
  --help           print this

LLAMA_URL or the question keeps the URL out of your shell's history.
LLAMA_STALL_SECONDS (default 60) is the patience with a silent server.
END
}

# folder, parameters, shards; a file of Llama 3.2 has the embedding's weights once
known_models() {
  cat <<'END'
llama-2-7b                   6738415616   1
llama-2-7b-chat              6738415616   1
llama-2-13b                  13015864320  2
llama-2-13b-chat             13015864320  2
llama-2-70b                  68976648192  8
llama-2-70b-chat             68976648192  8
CodeLlama-7b                 6738546688   1
CodeLlama-7b-Python          6738415616   1
CodeLlama-7b-Instruct        6738546688   1
CodeLlama-13b                13016028160  2
CodeLlama-13b-Python         13015864320  2
CodeLlama-13b-Instruct       13016028160  2
CodeLlama-34b                33743970304  4
CodeLlama-34b-Python         33743970304  4
CodeLlama-34b-Instruct       33743970304  4
CodeLlama-70b                68976910336  8
CodeLlama-70b-Python         68976648192  8
CodeLlama-70b-Instruct       68976910336  8
8b_pre_trained               8030261248   1
8b_instruction_tuned         8030261248   1
70b_pre_trained              70553706496  8
70b_instruction_tuned        70553706496  8
Llama-3.1-8B                 8030261248   1
Llama-3.1-8B-Instruct        8030261248   1
Llama-3.1-70B                70553706496  8
Llama-3.1-70B-Instruct       70553706496  8
Llama-3.1-405B-MP8           405853388800 8
Llama-3.1-405B-Instruct-MP8  405853388800 8
Llama-3.1-405B-MP16          410081247232 16
Llama-3.1-405B-Instruct-MP16 410081247232 16
Llama-3.2-1B                 1235814400   1
Llama-3.2-1B-Instruct        1235814400   1
Llama-3.2-3B                 3212749824   1
Llama-3.2-3B-Instruct        3212749824   1
Llama-3.3-70B-Instruct       70553706496  8
END
}

## Words to the user

fail() {  # fail WORDS...
  printf 'download.sh: %s\n' "$*" >&2
  exit 1
}

misuse() {  # misuse WORDS...
  printf 'download.sh: %s\n' "$*" >&2
  exit 2
}

# A URL given in the wrong place must not be repeated on the screen: its first letters will do.
first_word() {
  printf '%s' "${1%%[!a-zA-Z0-9-]*}"
}

gigabytes() {
  awk -v bytes="$1" 'BEGIN { printf "%.1f GB", bytes / 1e9 }'
}

ask() {  # ask QUESTION OPTION: sets $answer; OPTION would have made the question needless
  answer=''
  if [ -t 0 ]; then
    # Readline, because a terminal's own line editing cuts a line at 1024 bytes on macOS.
    read -r -e -p "$1: " answer
  else
    printf '%s:\n' "$1" >&2
    read -r answer || [ -n "$answer" ]
  fi || misuse "nobody to ask on standard input: give $2 (see --help)"
}

list_models() {  # list_models [FAMILY]
  local folder parameters shards
  while read -r folder parameters shards; do
    [ "${1-$(family_of "$folder")}" = "$(family_of "$folder")" ] || continue
    printf '%-28s %9s  %d file(s)\n' "$folder" "$(gigabytes $((2 * parameters)))" "$shards"
  done <<< "$(known_models)"
}

## Which models, and which files they have

family_of() {  # family_of FOLDER
  case $1 in
    llama-2-*) printf 'llama-2' ;;
    CodeLlama-*) printf 'CodeLlama' ;;
    Llama-3.*) printf '%.9s' "$1" ;;
    *) printf 'Llama-3' ;;
  esac
}

folders_of() {  # folders_of FAMILY
  local folder
  while read -r folder _; do
    [ "$(family_of "$folder")" != "$1" ] || printf '%s\n' "$folder"
  done <<< "$(known_models)"
}

# find_model NAME: its folder, or nothing. Meta writes 7B for one family and 7b for the other, which
# is too fine a difference to choose by: either will do.
find_model() {
  local short=$family-$1
  case $family:$1 in
    Llama-3:*-[Ii]nstruct) short=${1%-*}_instruction_tuned ;;
    Llama-3:*) short=$1_pre_trained ;;
  esac
  known_models | awk -v name="$1" -v short="$short" '
    tolower($1) == tolower(name) || tolower($1) == tolower(short) { print $1 }'
}

check_family() {
  case $family in
    [Ll]lama-2) family=llama-2 ;;
    [Cc]ode[Ll]lama) family=CodeLlama ;;
    [Ll]lama-3 | [Ll]lama-3.[123]) family=Llama-${family#*-} ;;
    *) misuse "unknown family '$(first_word "$family")': llama-2, CodeLlama, Llama-3 or" \
      "Llama-3.1 to 3.3" ;;
  esac
}

ask_models() {
  if [ -z "$family" ]; then
    ask 'Family (llama-2, CodeLlama, Llama-3, Llama-3.1, Llama-3.2 or Llama-3.3)' --family
    family=$answer
    check_family
  fi
  list_models "$family" >&2
  ask 'Models, comma-separated, or Enter for all of them' --models
  models=${answer:-all}
}

select_models() {
  local name folder
  [ -z "$family" ] || check_family
  if [ "$models" = all ]; then
    [ -n "$family" ] || misuse 'all of which family? give --family llama-2 or another'
    models=$(folders_of "$family")
  fi
  for name in ${models//,/ }; do
    folder=$(find_model "$name")
    [ -n "$folder" ] ||
      misuse "unknown model '$(first_word "$name")': see --list; short names need --family"
    family=${family:-$(family_of "$folder")}
    [ "$(family_of "$folder")" = "$family" ] ||
      misuse "$folder isn't of the family $family: a URL covers one family, so make it two runs"
    case " $selected " in
      *" $folder "*) ;;
      *) selected="$selected $folder" ;;
    esac
  done
  [ -n "$selected" ] || misuse 'no model in --models: see --list'
}

manifest() {  # every file of the selection as "bytes path", a checklist before what it lists
  local folder
  case $selected in
    *llama-2-* | *CodeLlama-*) printf '0 %s\n' LICENSE USE_POLICY.md ;;
    *b_*) printf '0 %s\n' LICENSE USE_POLICY ;;  # later versions of Llama 3 have neither
  esac
  case $selected in
    *llama-2-*) printf '0 %s\n' tokenizer_checklist.chk tokenizer.model ;;
  esac
  for folder in $selected; do
    model_files "$folder"
  done
}

model_files() {  # only checkpoints have a size worth counting: the rest stays below a megabyte
  local parameters shards shard
  read -r _ parameters shards <<< "$(known_models | grep "^$1 ")"
  printf '0 %s\n' "$1/checklist.chk" "$1/params.json"
  case $1 in
    llama-2-*) ;;
    *) printf '0 %s\n' "$1/tokenizer.model" ;;
  esac
  for ((shard = 0; shard < shards; shard++)); do
    printf '%s %s/consolidated.%02d.pth\n' $((2 * parameters / shards)) "$1" "$shard"
  done
}

## What is on disk

size_of() {
  if [ -e "$1" ]; then
    echo $(($(wc -c < "$1")))  # BSD's wc pads with blanks, arithmetic drops them
  else
    echo 0
  fi
}

missing() {  # what is left of the manifest, as "bytes still to come, path"
  local bytes path
  while read -r bytes path; do
    if [ ! -s "$dir/$path" ]; then
      bytes=$((bytes - $(size_of "$dir/$path.part")))
      printf '%s %s\n' $((bytes > 0 ? bytes : 0)) "$path"
    fi
  done <<< "$(manifest)"
}

checklist_of() {  # checklist_of PATH: the file with its checksum; nothing for a file without one
  case $1 in
    *.chk | LICENSE | USE_POLICY*) ;;
    */*) printf '%s/checklist.chk' "${1%/*}" ;;
    *) printf 'tokenizer_checklist.chk' ;;
  esac
}

check_md5() {
  command -v md5sum > /dev/null || command -v md5 > /dev/null ||
    fail 'neither md5sum nor md5 here: install coreutils, which has md5sum'
}

md5_of() {
  if command -v md5sum > /dev/null; then
    md5sum < "$1" | cut -c 1-32
  else
    md5 -q "$1"
  fi
}

# examine FILE PATH: sets $state, which is how FILE does as the content of PATH. Unlisted comes
# first: without a checksum to compare it with, there is no point in fetching a checkpoint.
examine() {
  local checklist expected=''
  state=good
  checklist=$(checklist_of "$2")
  if [ -n "$checklist" ]; then
    # Names stand there as they are, after a *, or after ./ for the later versions of Llama 3.
    expected=$(awk -v name="${2##*/}" '{ sub(/^([*]|[.][/])/, "", $2) }
      $2 == name { print $1; exit }' "$dir/$checklist" 2> /dev/null) || true
  fi
  if [ -n "$checklist" ] && [ -z "$expected" ]; then
    state=unlisted
  elif [ ! -s "$1" ]; then
    state=missing
  elif [ -n "$expected" ]; then
    printf '%s: checking\n' "$2"
    [ "$(md5_of "$1")" = "$expected" ] || state=damaged
  fi
}

verify() {
  local folder path bad=0
  check_md5
  for folder in $(known_models | awk '{ print $1 }'); do
    [ ! -d "$dir/$folder" ] || selected="$selected $folder"
  done
  [ -n "$selected" ] || fail "no model in $dir: name the folder that holds llama-2-7b or the like"
  while read -r _ path; do
    [ -n "$(checklist_of "$path")" ] || continue
    examine "$dir/$path" "$path"
    printf '%-8s  %s\n' "$state" "$path"
    [ "$state" = good ] || bad=$((bad + 1))
  done <<< "$(manifest)"
  [ "$bad" = 0 ] || fail "$bad file(s) not good in $dir: download again to repair them"
}

dry_run() {
  local bytes path count=0 total=0
  while read -r bytes path; do
    [ -n "$path" ] || continue
    count=$((count + 1)) total=$((total + bytes))
    printf '%9s  %s\n' "$(gigabytes "$bytes")" "$path"
  done <<< "$(missing)"
  printf '%9s  in %d file(s) to fetch into %s\n' "$(gigabytes "$total")" "$count" "$dir"
}

check_space() {
  local needed free
  needed=$(missing | awk '{ sum += $1 } END { printf "%.0f", sum }')
  # The column before the percentage, because a volume's name may hold blanks.
  free=$(df -Pk "$dir" | awk 'NR == 2 {
    for (i = 4; i < NF && $(i + 1) !~ /^([0-9]+%|-)$/; i++);
    printf "%.0f", $i * 1024 }')
  [ "${free:-0}" -ge "$needed" ] ||
    fail "$(gigabytes "$needed") to fetch, but $dir has $(gigabytes "${free:-0}") free:" \
      "make room or choose another --dir"
}

## The signed URL

read_url() {
  if [ -z "$url" ]; then
    ask 'Signed URL from the e-mail' 'the URL in LLAMA_URL'
    url=$answer
  fi
  url=${url#"${url%%[![:space:]]*}"}
  url=${url%"${url##*[![:space:]]}"}
  check_url
  # Both tools want these encoded, and the quotes of curl's config need no escapes then.
  url=${url// /%20}
  url=${url//\"/%22}
  url=${url//\\/%5C}
}

check_url() {
  local copy='copy the text of the link in the e-mail' host=${url#*://}
  case $url in
    *[[:cntrl:]]*) misuse "the URL is broken into lines: $copy as one line" ;;
    *://*http*://* | *://*http*%3A* | *://*-3A__*)
      misuse "the URL is a mail client's redirect through ${host%%[/?]*}:" \
        "$copy, not the link's target" ;;
    *'&amp;'*) misuse "the URL has &amp; where it should have &: $copy, not the e-mail's source" ;;
    http://*'*'* | https://*'*'*) ;;
    http://* | https://*) misuse "the URL has no * for the file names: $copy whole" ;;
    *) misuse "the URL doesn't begin with https://: $copy whole" ;;
  esac
}

# Arguments stand in everyone's process list and the environment doesn't, so start again with it.
hide_url() {
  export LLAMA_URL="$url" LLAMA_FAMILY="$family" LLAMA_MODELS="$models" LLAMA_DIR="$dir"
  exec "$BASH" "$0"
}

## One transfer

choose_tool() {
  if command -v curl > /dev/null; then
    tool=curl
  else
    case $(wget --version 2> /dev/null) in
      'GNU Wget 1.'*) tool=wget ;;
      *) fail 'neither curl nor GNU wget here: install one of them' ;;
    esac
  fi
}

with_curl() {  # with_curl URL OPTION...: a URL on standard input is in no process list
  local url=$1
  shift
  printf 'url = "%s"\n' "$url" | curl --config - --globoff --location \
    --connect-timeout "$stall_seconds" --speed-limit 1 --speed-time "$stall_seconds" "$@"
}

with_wget() {  # with_wget URL OPTION...
  local url=$1
  shift
  printf '%s\n' "$url" | wget --input-file=- --tries=1 --timeout="$stall_seconds" "$@"
}

# attempt_curl URL PART and attempt_wget URL PART continue PART and set $outcome (whole, stalled,
# unwritable, answered or broken), $http_status (000 without one) and $content_type.

attempt_curl() {
  local progress=--silent reply code=0
  [ ! -t 2 ] || progress=--progress-bar
  reply=$(with_curl "$1" --fail --continue-at - --output "$2" "$progress" \
    --write-out '%{http_code} %{content_type}') || code=$?
  http_status=${reply%% *}
  content_type=${reply#* }
  case $code in
    0) outcome=whole ;;
    28) outcome=stalled ;;
    23) outcome=unwritable ;;
    22 | 33) outcome=answered ;;
    *) outcome=broken ;;
  esac
}

attempt_wget() {
  local progress=--progress=dot:giga log=$scratch/log code=0
  [ ! -t 2 ] || progress=--show-progress
  # The log repeats the URL, and wget has no other way to tell the status.
  with_wget "$1" --continue --output-document="$2" "$progress" \
    --server-response --output-file="$log" || code=$?
  http_status=$(awk '$1 ~ /^HTTP\// { code = $2 } END { print (code ? code : "000") }' "$log")
  content_type=$(awk 'tolower($1) == "content-type:" { type = $2 } END { print type }' "$log")
  case $code in
    0) outcome=whole ;;
    3) outcome=unwritable ;;
    8) outcome=answered ;;
    *) outcome=broken ;;
  esac
  if [ $outcome = broken ] && grep -q 'timed out' "$log"; then
    outcome=stalled
  fi
}

attempt() {  # attempt URL PART: narrows $outcome down to what the next step depends on
  "attempt_$tool" "$1" "$2"
  case $outcome:$http_status in
    answered:416) outcome=whole ;;  # PART had all of it when the last run was interrupted
    answered:* | broken:[45]??) outcome=$http_status ;;
    broken:000 | broken:) outcome=unreachable ;;
    broken:*) outcome=dropped ;;
  esac
  if [ "$http_status" = 200 ] && is_web_page "$2"; then
    outcome=page
  fi
}

is_web_page() {  # is_web_page PART
  case $content_type in
    text/html*) return 0 ;;
  esac
  [ -e "$1" ] && head -c 512 "$1" | grep -q -i -E '<(!doctype|html|[?]xml)'
}

says_expired() {  # says_expired URL: whether the server's refusal gives that reason
  local body=$scratch/body
  : > "$body"
  case $tool in
    curl) with_curl "$1" --silent --range 0-4095 --output "$body" ;;
    wget) with_wget "$1" --quiet --header='Range: bytes=0-4095' --content-on-error \
      --output-document="$body" ;;
  esac || true
  grep -q -i expired "$body"
}

## From the server to the final name

receive() {  # receive PATH: fills PATH.part, trying again for as long as bytes arrive
  local path=$1 part=$dir/$1.part before last_bytes=$SECONDS
  while true; do
    before=$(size_of "$part")
    attempt "${url/\*/$path}" "$part"
    case $outcome in
      whole) return ;;
      stalled | dropped | unreachable | 429 | 5??) ;;
      *) break ;;
    esac
    if [ "$(size_of "$part")" -gt "$before" ]; then
      last_bytes=$SECONDS
      printf '%s: %s, resuming\n' "$path" "$outcome"
    elif [ $((SECONDS - last_bytes)) -ge "$stall_seconds" ]; then
      break
    else
      sleep 1
    fi
  done
  if [ "$outcome" = page ] && [ "$(size_of "$part")" != "$before" ]; then
    rm -f "$part"  # the page went into it
  fi
  [ -s "$part" ] || rm -f "$part"
  explain "$path"
}

explain() {  # explain PATH: ends the run with the reason why PATH didn't arrive
  local again='what has arrived is kept, so run this again'
  case $outcome in
    4??) ! says_expired "${url/\*/$1}" || outcome=expired ;;
  esac
  case $outcome in
    expired) fail "$1: the link has expired: ask Meta for a new one; $again with it" ;;
    403) fail "$1: the server refuses the link (403): it is old, used up or for another family:" \
      "ask Meta for a new one; $again with it" ;;
    404) fail "$1: the server doesn't have it (404): is the link for the family $family?" ;;
    page) fail "$1: a web page came in place of the file: see that no network login is in the" \
      "way, and copy the link again from the e-mail or ask Meta for a new one" ;;
    stalled) fail "$1: no data for $stall_seconds seconds: $again" ;;
    dropped) fail "$1: the connection closes before the end of the file: $again" ;;
    unreachable) fail "$1: can't connect to the server: check the network; $again" ;;
    unwritable) fail "$1: can't write to $dir: make room or check the permissions; $again" ;;
    *) fail "$1: unexpected answer $outcome from the server: $again later" ;;
  esac
}

fetch() {  # fetch PATH: nothing gets its final name before its checksum is right
  local path=$1 part=$dir/$1.part
  examine "$dir/$path" "$path"
  case $state in
    good)
      printf '%s: complete\n' "$path"
      return
      ;;
    # It may be the partial download of another tool, and then what is there counts.
    damaged) mv -f "$dir/$path" "$part" ;;
    unlisted) fail "$path: not listed in $(checklist_of "$path"): remove that and run again" ;;
  esac
  printf '%s: downloading\n' "$path"
  mkdir -p "$(dirname "$part")" 2> /dev/null ||
    fail "can't make a folder in $dir: check the permissions"
  receive "$path"
  examine "$part" "$path"
  case $state in
    good) mv -f "$part" "$dir/$path" ;;
    missing) fail "$path: the server sent an empty file: run again later" ;;
    damaged)
      rm -f "$part"
      fail "$path: wrong MD5 checksum, so it was removed: run again to fetch it afresh"
      ;;
  esac
}

clean_up() {
  [ -z "$scratch" ] || rm -rf "$scratch"
  [ -z "$lock" ] || rmdir "$lock" || true
}

# Two runs would write to the same .part files.
take_lock() {
  [ -w "$dir" ] || fail "can't write to $dir: choose another --dir"
  mkdir "$dir/.download.lock" 2> /dev/null ||
    fail "another download works in $dir; if none does, remove the folder $dir/.download.lock"
  lock=$dir/.download.lock
}

download() {
  local path
  choose_tool
  check_md5
  mkdir -p "$dir" 2> /dev/null || fail "can't make the folder $dir: choose another --dir"
  trap clean_up EXIT
  trap 'exit 129' HUP
  trap 'exit 130' INT
  trap 'exit 143' TERM
  take_lock
  scratch=$(mktemp -d "${TMPDIR:-/tmp}/llama.XXXXXX")
  check_space
  while read -r _ path; do
    fetch "$path"
  done <<< "$(manifest)"
  printf 'All files are complete in %s\n' "$dir"
}

parse() {
  local url_is_argument=''
  while [ $# -gt 0 ]; do
    case $1 in
      --list | --help) task=${1#--} ;;
      --dry-run) task=dry_run ;;
      --url | --family | --models | --dir | --verify)
        [ $# -gt 1 ] || misuse "$1 needs a value: see --help"
        case $1 in
          --url) url=$2 url_is_argument=yes ;;
          --family) family=$2 ;;
          --models) models=$2 ;;
          --dir) dir=$2 ;;
          --verify) task=verify dir=$2 ;;
        esac
        shift
        ;;
      *) misuse "unknown option '$(first_word "$1")': see --help" ;;
    esac
    shift
  done
  if [ "$task" = download ] && [ -n "$url_is_argument" ]; then
    hide_url
  fi
}

check_settings() {
  case $stall_seconds in
    *[!0-9]* | 0*) misuse 'LLAMA_STALL_SECONDS must be a whole number of seconds, at least 1' ;;
  esac
  case $dir in
    '' | -*) dir=./$dir ;;  # the root, or an option of mkdir and df, is not what was meant
  esac
}

main() {
  parse "$@"
  check_settings
  case $task in
    help) usage ;;
    list) list_models ;;
    verify) verify ;;
    *)
      [ "$task" = dry_run ] || read_url  # the first question, as in Meta's scripts
      [ -n "$models" ] || ask_models
      select_models
      "$task"
      ;;
  esac
}

main "$@"
