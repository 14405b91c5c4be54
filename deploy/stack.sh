#!/bin/sh
# What `make up`, `scale`, `logs`, `down` do, and where `make enqueue`, `status`, `search`, `list` run: in the containers
# of docker compose if an engine answers, else in processes on this machine. `up` notes in .up/ which of the two it
# took and with which files; the others keep to that. Without a note, commands run on this machine.
#   stack.sh up|join|scale [WORKERS] · logs · down · certificates HOST · ruiji COMMAND …
set -eu
cd -P "$(dirname "$0")/.."
note=.up/with
say() { echo "$*" >&2; }
refuse() { say "error: $*"; exit 2; }

mode=
if [ -e $note ]; then
	case ${1:-} in
	up | join) mode=$(sed -n 's/^mode=//p' $note) ;; # With which files is chosen anew.
	*) . ./$note ;;
	esac
fi

# Before anything is ended or made: with no worker left, or none that can start, all work stops.
workers() {
	case $1 in
	[1-9] | [1-9][0-9] | [1-9][0-9][0-9]) ;;
	*) refuse "WORKERS must be a number from 1 to 999, not '$1'; make down stops all of them" ;;
	esac
}

# --- docker compose ---------------------------------------------------------------------------------------------------

# Why an engine that is installed does not answer has to be seen: work then goes elsewhere.
engine_answers() {
	command -v docker >/dev/null || return 1
	answer=$(docker version 2>&1 >/dev/null) && answer=$(docker compose version 2>&1 >/dev/null) && return
	say "docker does not answer: $(echo "$answer" | tail -1)"
	return 1
}

# What compose itself makes of these variables, from the shell, else from .env; other ways to read .env differ from it.
# As names of images, which are the only values that every compose prints as they are.
read_settings() {
	found=$({
		printf 'name: not-set\nservices:\n'
		for name in COMPOSE_FILE COMPOSE_PROFILES COMPOSE_PROJECT_NAME CONTAINER_USER MODEL_DIR REDIS_HOST REDIS_PORT \
			RUIJI_FEATURE_DIR RUIJI_MEDIA_DIR RUIJI_MODEL RUIJI_WEB_PORT; do
			echo "  $name: {image: '$name=\${$name-}'}"
		done
	} | docker compose -f - config --images) || exit 2
}
setting() { echo "$found" | sed -n "s/^$1=//p"; }

# Containers never run as root: for root they take 1000. They read secrets/ and write the feature folder.
container_user() {
	user=$(setting CONTAINER_USER)
	[ -n "$user" ] || user=$(id -u):$(id -g)
	case $user in
	*[!0-9:]* | *:*:* | :* | *:) refuse "CONTAINER_USER must be numbers, like 1000:1000, not '$user'" ;;
	0 | 0:*) user=1000:1000 ;;
	esac
	echo "$user"
}

own() { [ "$(id -u)" != 0 ] || chown "$CONTAINER_USER" "$@"; }

# One of this folder's own, so that two clones in folders of one name keep apart. What was started here under another
# name, by plain docker compose or before a folder was moved, goes on under that.
project() {
	name=$(setting COMPOSE_PROJECT_NAME)
	started=$(docker ps -a --filter label=com.docker.compose.service --filter \
		"label=com.docker.compose.project.working_dir=$PWD" --format '{{.Label "com.docker.compose.project"}}' | sort -u)
	if [ "$name" = not-set ]; then
		name=$(sed -n "s/.*COMPOSE_PROJECT_NAME='\(.*\)'$/\1/p" $note 2>/dev/null || true)
		[ -n "$name" ] || name=$(echo "$started" | head -1)
	fi
	if [ -z "$name" ]; then
		name=$(basename "$PWD" | tr 'A-Z' 'a-z' | tr -cd 'a-z0-9_-' | sed 's/^[_-]*//')
		name=${name:-ruiji}-$(printf %08x "$(printf %s "$PWD" | cksum | cut -d ' ' -f 1)")
	fi
	for other in $started; do
		[ "$other" = "$name" ] || say "this folder has containers of the project $other too: docker compose -p $other down" \
			"ends them"
	done
	echo "$name"
}

# The containers of another clone are not to be replaced, ended or taken for this one's.
only_ours() {
	docker ps -a --filter "label=com.docker.compose.project=$COMPOSE_PROJECT_NAME" \
		--format '{{.Label "com.docker.compose.project.working_dir"}}' | sort -u | while read -r folder; do
		[ ! -d "$folder" ] || [ "$folder" -ef . ] || refuse "the containers of the project $COMPOSE_PROJECT_NAME are those" \
			"of $folder. If this folder is a copy of it, remove .up/ here; else set another COMPOSE_PROJECT_NAME in .env"
	done
}

secret() {
	[ ! -e "secrets/$1" ] || return 0
	mkdir -p secrets
	(umask 077 && head -c 24 /dev/urandom | base64 | tr -d '+/=\n' > "secrets/$1")
}

# It talks on stderr even where all is well.
openssl_quietly() { said=$(openssl "$@" 2>&1) || { say "openssl failed:"; say "$said"; exit 1; }; }

# Without what stands around an IPv6 address in a URL.
bare() { host=${1#[}; echo "${host%]}"; }

# A CA of this installation's own, and the certificate of the host that runs Redis, for ten years.
certificates() {
	command -v openssl >/dev/null || { say "no openssl: install it (on Debian or Ubuntu apt-get install openssl)"; exit 1; }
	host=$(bare "$1")
	case $host in *:*) name=IP:$host ;; *[!0-9.]*) name=DNS:$host ;; *) name=IP:$host ;; esac
	mkdir -p secrets
	cd secrets
	umask 077
	new="req -newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes"
	ca_name="/CN=ruiji's own CA"
	ca="-x509 -days 3650 -addext keyUsage=critical,keyCertSign,cRLSign -out redis_ca"
	# Every other host trusts this one.
	if [ -e redis_ca ]; then
		[ -e ca_key ] || refuse "secrets/redis_ca has lost its ca_key: put that back, or remove redis_ca for a new CA," \
			"whose redis_ca every other host then needs"
		say "with the CA that is in secrets/; Redis takes its new certificate at the next make down and make up"
		# Python 3.13 refuses a CA that does not say what it signs. Its key stays, so those with the old redis_ca trust it.
		openssl x509 -in redis_ca -noout -text | grep -q 'Certificate Sign' || {
			openssl_quietly req -key ca_key -subj "$ca_name" $ca
			say "redis_ca is new, of the same key: hosts with Python 3.13 or later need it, the others can keep theirs"
		}
	else
		openssl_quietly $new -subj "$ca_name" -keyout ca_key $ca
	fi
	openssl_quietly $new -subj "/CN=$host" -keyout new_key -out request
	printf '%s\n' "subjectAltName=$name,DNS:redis,DNS:localhost,IP:127.0.0.1" authorityKeyIdentifier=keyid > extensions
	openssl_quietly x509 -req -in request -CA redis_ca -CAkey ca_key -CAcreateserial -days 3650 -extfile extensions \
		-out new_certificate
	mv new_key redis_key
	mv new_certificate redis_certificate
	rm -f request extensions redis_ca.srl
	# Public, and read by Redis under an id of its own.
	chmod 644 redis_ca redis_certificate
	own redis_ca redis_certificate redis_key
	cd ..
}

# What several hosts need, before containers fail for want of it.
several_hosts() {
	host=$(bare "$(setting REDIS_HOST)")
	case $host in
	localhost | 127.* | ::1 | 0.0.0.0 | ::) refuse "REDIS_HOST=$host means each container itself: give the name or the" \
		"address under which every host and its containers reach the one with Redis" ;;
	esac
	if [ "$1" = join ]; then
		for file in redis_password redis_ca; do
			[ -e secrets/$file ] || refuse "no secrets/$file: copy it from $host"
		done
		return
	fi
	for file in redis_ca redis_certificate redis_key; do
		[ -e secrets/$file ] || refuse "no secrets/$file: make certificates REDIS_HOST=$(setting REDIS_HOST) makes it"
	done
	command -v openssl >/dev/null || return 0
	case $host in *:*) check=-checkip ;; *[!0-9.]*) check=-checkhost ;; *) check=-checkip ;; esac
	if openssl x509 -in secrets/redis_certificate -noout $check "$host" | grep -q 'NOT match'; then
		refuse "secrets/redis_certificate is not for $host: make certificates REDIS_HOST=$(setting REDIS_HOST) makes one"
	fi
}

compose_files() {
	files=docker-compose.yml
	case ${GPU:-0} in
	0) ;;
	1) files=$files:docker-compose.gpu.yml ;;
	*) refuse "GPU must be 1 or 0, not '$GPU'" ;;
	esac
	[ -z "$(setting REDIS_HOST)" ] || files=$files:docker-compose.hosts.yml
	# Compose adds it by itself only if nobody names files.
	[ ! -e docker-compose.override.yml ] || files=$files:docker-compose.override.yml
	echo "$files"
}

# What is up once serves on, until `down`.
profiles() {
	profiles=$(setting COMPOSE_PROFILES)
	before=$(sed -n "s/.*COMPOSE_PROFILES='\(.*\)'$/\1/p" $note 2>/dev/null || true)
	[ -n "$profiles" ] || profiles=$before
	if [ "$1" != join ] && [ "${SERVE:-0}" = 1 ]; then
		case ,$profiles, in *,serve,*) ;; *) profiles=${profiles:+$profiles,}serve ;; esac
	fi
	echo "$profiles"
}
serves() { case ,${COMPOSE_PROFILES:-}, in *,serve,*) ;; *) return 1 ;; esac; }

# A line for the note: what the shell has by then still wins.
remember() {
	eval "value=\${$1:-}"
	[ -z "$value" ] || printf "[ -n \"\${%s+set}\" ] || export %s='%s'\n" "$1" "$1" "$(echo "$value" | sed "s/'/'\\\\''/g")"
}

compose_up() {
	[ -e .env ] || [ -n "${RUIJI_MEDIA_DIR:-}" ] || refuse "no .env: copy .env.example to it, and set RUIJI_MEDIA_DIR, RUIJI_FEATURE_DIR, MODEL_DIR and RUIJI_MODEL in it"
	read_settings
	for name in RUIJI_MEDIA_DIR RUIJI_FEATURE_DIR MODEL_DIR RUIJI_MODEL; do
		case $(setting $name) in /*) ;; *) refuse "$name must be an absolute path (in .env), not '$(setting $name)'" ;; esac
	done
	case $(setting RUIJI_MODEL) in
	"$(setting MODEL_DIR | sed 's:/*$::')"/*) ;;
	*) refuse "RUIJI_MODEL ($(setting RUIJI_MODEL)) must be in MODEL_DIR ($(setting MODEL_DIR)): containers see that folder" ;;
	esac
	# Not on one line with `export`, which would hide a refusal.
	COMPOSE_FILE=$(setting COMPOSE_FILE)
	[ -n "$COMPOSE_FILE" ] || COMPOSE_FILE=$(compose_files)
	CONTAINER_USER=$(container_user)
	COMPOSE_PROJECT_NAME=$(project)
	export COMPOSE_FILE CONTAINER_USER COMPOSE_PROJECT_NAME
	only_ours
	[ -z "$(setting REDIS_HOST)" ] || several_hosts "$1"
	[ "$1" = join ] || secret redis_password
	COMPOSE_PROFILES=$(profiles "$1")
	export COMPOSE_PROFILES
	! serves || secret web_token
	# All that containers read; what was copied here by root is root's.
	for file in redis_password redis_ca redis_certificate redis_key web_token; do
		[ ! -e secrets/$file ] || own secrets/$file
	done
	mkdir -p .up
	{
		echo mode="$1"
		# Settings of this command line hold for later commands too.
		for name in $({ grep -ohE '\$\{[A-Z_]+|^ +RUIJI_[A-Z_]+: *$' docker-compose*.yml; echo COMPOSE_FILE; echo COMPOSE_PROFILES; } |
			tr -d '${ :' | sort -u); do
			remember "$name"
		done
	} > $note
	say "with docker compose ($COMPOSE_FILE), project $COMPOSE_PROJECT_NAME, as $CONTAINER_USER"
	features=$(setting RUIJI_FEATURE_DIR)
	[ -d "$features" ] || { mkdir -p "$features"; own "$features"; }
	docker compose build worker
	look_from_inside "$1"
}

# Containers see neither /etc/hosts nor, as another user, every file: what they cannot use is said before they start.
look_from_inside() {
	host= port=
	[ -z "$(setting REDIS_HOST)" ] || host=$(bare "$(setting REDIS_HOST)")
	[ "$1" != join ] || port=$(setting REDIS_PORT) port=${port:-6379}
	docker compose run --rm --no-deps -T --entrypoint sh cli -c '
		ok=0
		bad() { echo "error: $*" >&2; ok=1; }
		for file in /run/secrets/*; do
			[ -r "$file" ] || bad "user $1 of the containers cannot read secrets/${file##*/}: chown $1 secrets/${file##*/}"
		done
		[ -r "$RUIJI_MODEL" ] || bad "user $1 of the containers cannot read the model $RUIJI_MODEL, or it does not exist"
		[ -r "$RUIJI_MEDIA_DIR" ] && [ -x "$RUIJI_MEDIA_DIR" ] ||
			bad "user $1 of the containers cannot read the media folder $RUIJI_MEDIA_DIR"
		[ -w "$RUIJI_FEATURE_DIR" ] && [ -x "$RUIJI_FEATURE_DIR" ] ||
			bad "user $1 of the containers cannot write to the feature folder $RUIJI_FEATURE_DIR: chown $1 $RUIJI_FEATURE_DIR"
		if [ -n "$2" ] && ! getent ahosts "$2" >/dev/null; then
			bad "containers do not find the host $2: they ask DNS, and do not see /etc/hosts." \
				"Give an address, or a name that DNS knows, as REDIS_HOST"
		elif [ -n "$3" ]; then
			python -c "import socket, sys; socket.create_connection((sys.argv[1], int(sys.argv[2])), 5)" "$2" "$3" 2>/dev/null ||
				bad "nothing answers at $2, port $3 (REDIS_HOST, REDIS_PORT): is Redis up there, and does a firewall let it through?"
		fi
		exit $ok' sh "$CONTAINER_USER" "$host" "$port"
}

# As many as the GPU slots are for: another would wait for one, and never be healthy.
default_workers() {
	case $COMPOSE_FILE in
	*docker-compose.gpu.yml*) docker compose run --rm --no-deps -T --entrypoint python worker -P -m workers.slots ;;
	*) echo 2 ;;
	esac
}

# Starts or changes containers, and waits until they can take a task; says why they cannot.
compose_start() {
	docker compose up -d --wait "$@" && return
	unwell=$(docker compose ps -a --format '{{.Service}} {{.Health}}' | sed -n 's/ healthy$//; t; s/ .*//p' | sort -u)
	# The others wait for Redis.
	case " $(echo $unwell) " in *" redis "*) unwell=redis ;; esac
	log=$(docker compose logs --no-color --tail 10 $unwell)
	say "$log"
	if [ "$unwell" = redis ] && echo "$log" | grep -qiE 'reading the append only file|aof manifest'; then
		say "Redis cannot read the queue in its volume. Nothing is lost without it, the features are in the feature folder:"
		say "  make down && docker volume rm ${COMPOSE_PROJECT_NAME}_redis && make up && make enqueue"
	fi
	exit 1
}

# A command in a container of its own. It may do without Redis or workers; if it fails and they do not run, as after an
# interrupted `up`, docker's words do not say what to do.
compose_run() {
	needed=redis target=up
	[ "$mode" != join ] || needed=worker target=join
	[ -z "$(docker compose ps -q --status running $needed 2>/dev/null)" ] || exec docker compose run --rm "$@"
	docker compose run --rm "$@" && exit
	code=$?
	say "the containers are not running, as after a make $target that was interrupted: run make $target again"
	exit $code
}

# --- processes on this machine ----------------------------------------------------------------------------------------

here() { say "on this machine (.venv, no containers)"; [ -x .venv/bin/ruiji ] || make --no-print-directory setup; }

# What ruiji makes of a variable, from the shell, else from .env.
ruiji_setting() {
	.venv/bin/python -P -c '
import os, sys
from pipeline import errors, settings
try:
    settings.load_dotenv()
except errors.RuijiError as error:
    sys.exit(f"error: {error}")
print(os.environ.get(sys.argv[1], ""))' "$1"
}

# Runs until `down`, also when this terminal is closed.
background() { name=$1; shift; setsid "$@" >>.up/"$name".log 2>&1 </dev/null & echo $! > .up/"$name".pid; }

# Whether what was started under this name runs: after a reboot its number may be a stranger's.
alive() { { tr '\0' ' ' < "/proc/$(cat .up/"$1".pid)/cmdline" | grep -q "bin/ruiji ${1%-before}"; } 2>/dev/null; }

end() { # a process and all that it started, in order
	if alive "$1"; then kill "$(cat .up/"$1".pid)" || true; fi
	while alive "$1"; do sleep 0.2; done
	rm -f .up/"$1".pid
}

here_up() {
	mkdir -p .up
	echo mode=here > $note
	remember GPU >> $note
	if ! alive redis && [ -z "$(ruiji_setting RUIJI_REDIS_URL)" ]; then
		: > .up/redis.log
		background redis .venv/bin/ruiji redis
		until grep -q '^Redis at' .up/redis.log; do
			kill -0 "$(cat .up/redis.pid)" 2>/dev/null || { cat .up/redis.log >&2; rm .up/redis.pid; exit 1; }
			sleep 0.2
		done
	fi
	here_scale "$1"
}

# The service; it may begin before there is a gallery.
here_serve() {
	if ! alive serve; then
		features=$(ruiji_setting RUIJI_FEATURE_DIR)
		[ -z "$features" ] || mkdir -p "$features"
		: > .up/serve.log
		background serve .venv/bin/ruiji serve
		until grep -q ' answers; ' .up/serve.log; do
			kill -0 "$(cat .up/serve.pid)" 2>/dev/null || { cat .up/serve.log >&2; rm .up/serve.pid; exit 1; }
			sleep 0.2
		done
	fi
	say "the page: $(sed -n 's/ answers; .*//p' .up/serve.log)"
}

# Whether a worker has started any that embed or reduce; it looks for GPUs in one before.
processes() {
	for child in $(cat "/proc/$1/task/$1/children" 2>/dev/null); do
		! tr '\0' ' ' 2>/dev/null < "/proc/$child/cmdline" | grep -q worker-process || return 0
	done
	return 1
}

# The worker of before ends once the new one has started its processes, or waits for that one's GPU: if it cannot, for
# whatever reason, work goes on as it was.
here_scale() {
	rm -f .up/worker-before.pid
	[ ! -e .up/worker.pid ] || mv .up/worker.pid .up/worker-before.pid
	: >>.up/worker.log
	before=$(wc -c < .up/worker.log)
	[ "${GPU:-0}" != 1 ] || set -- "$1" --device cuda
	background worker .venv/bin/ruiji worker ${1:+--processes "$1"} ${2:+"$2" "$3"}
	said() { tail -c +$((before + 1)) .up/worker.log; }
	started=$(cat .up/worker.pid)
	until processes "$started" || said | grep -q slot_waiting; do
		kill -0 "$started" 2>/dev/null && sleep 0.1 && continue
		said | tail -3 >&2
		rm -f .up/worker.pid
		alive worker-before || exit 1
		mv .up/worker-before.pid .up/worker.pid
		say "the old workers continue"
		exit 1
	done
	end worker-before
	say "${1:-as many as pay} embed processes and a reducer are running; make logs shows their log"
}

# --- commands ---------------------------------------------------------------------------------------------------------

command=$1; shift
case $command in
up | join | scale) workers "${1:-2}" ;;
esac
case $mode in
compose | join) [ -z "${COMPOSE_PROJECT_NAME:-}" ] || only_ours ;;
esac
case $command in
up)
	if [ "$mode" = here ] || { [ -z "$mode" ] && ! engine_answers; }; then
		here
		[ "${GPU:-0}" = 1 ] || set -- "${1:-2}"
		here_up "${1:-}"
		[ "${SERVE:-0}" != 1 ] || here_serve
	else
		compose_up compose
		count=${1:-$(default_workers)}
		compose_start --scale worker="$count"
		if serves; then
			port=$(setting RUIJI_WEB_PORT)
			say "the page: http://127.0.0.1:${port:-8000}; its token is in secrets/web_token"
		fi
	fi ;;
join)
	engine_answers || refuse "make join needs a Docker engine; without one: ruiji worker (docs/deployment.md)"
	read_settings
	[ -n "$(setting REDIS_HOST)" ] || refuse "make join needs REDIS_HOST, the host with Redis"
	compose_up join
	count=${1:-$(default_workers)}
	compose_start --no-deps --scale worker="$count" worker ;;
scale)
	case $mode in
	here) here; here_scale "$1" ;;
	'') say "nothing is up here; make up WORKERS=$1 starts it"; exit 1 ;;
	*) say "with docker compose"; compose_start --no-deps --no-recreate --scale worker="$1" worker ;;
	esac ;;
logs)
	case $mode in
	here) tail -n 20 -F .up/*.log ;;
	'') say "nothing is up here"; exit 1 ;;
	*) docker compose logs -f ;;
	esac ;;
down)
	case $mode in
	here) say "on this machine"; end serve; end worker-before; end worker; end redis ;;
	'') say "nothing is up here" ;;
	*) say "with docker compose"; docker compose --profile serve --profile compare down ;;
	esac
	rm -rf .up ;;
certificates)
	found=
	! docker compose version >/dev/null 2>&1 || read_settings
	CONTAINER_USER=$(container_user)
	secret redis_password
	own secrets/redis_password
	certificates "$1"
	say "secrets/: redis_password and redis_ca go to every other host; redis_key stays here, ca_key can be put away" ;;
ruiji)
	if [ -z "$mode" ] || [ "$mode" = here ]; then
		here
		exec .venv/bin/ruiji "$@"
	fi
	if [ "$1" = list ]; then
		say "in a container of docker compose; the list can be written to the media folder, or with --out below" \
			"RUIJI_FEATURE_DIR (RUIJI_LIST in .env then names it)"
		compose_run list "$@"
	fi
	say "in a container of docker compose; files can be written below RUIJI_FEATURE_DIR only; \`ruiji X\` is" \
		"make ruiji ARGS=X here"
	# A query may lie anywhere; the container sees it under its own name.
	if [ "$1" = search ] && [ -e "${2:-}" ]; then
		query=$(realpath -- "$2"); shift 2
		compose_run --no-deps -v "$query:$query:ro" cli search "$query" "$@"
	fi
	compose_run --no-deps cli "$@" ;;
*) sed -n '2,5p' "$0" >&2; exit 2 ;;
esac
