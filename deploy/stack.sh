#!/bin/sh
# What `make up`, `scale`, `logs`, `down` do, and where `make enqueue`, `status`, `search`, `list` run: in the containers
# of docker compose where an engine answers, else in processes on this machine. `up` notes in .up/ which of the two it
# took and with which files; the others keep to that. Without a note, commands run on this machine.
#   stack.sh up|join|scale [WORKERS] · logs · down · certificates HOST · ruiji COMMAND …
set -eu
cd "$(dirname "$0")/.."
note=.up/with
say() { echo "$*" >&2; }

mode=
if [ -e $note ]; then
	case ${1:-} in
	up | join) mode=$(sed -n 's/^mode=//p' $note) ;; # With which files is chosen anew.
	*) . ./$note ;;
	esac
fi

# --- docker compose ---------------------------------------------------------------------------------------------------

engine_answers() { docker version >/dev/null 2>&1 && docker compose version >/dev/null 2>&1; }

# The value of a variable that only compose reads: from the shell, else from .env.
setting() {
	eval "value=\${$1:-}"
	[ -n "$value" ] || value=$(sed -n "s/^$1=//p" .env 2>/dev/null | tail -1)
	echo "$value"
}

# Containers never run as root: for root they take 1000. They read secrets/ and write the feature folder.
container_user() {
	user=$(setting CONTAINER_USER)
	[ -n "$user" ] || user=$(id -u):$(id -g)
	[ "${user%%:*}" != 0 ] || user=1000:1000
	echo "$user"
}

own() { [ "$(id -u)" != 0 ] || chown "$CONTAINER_USER" "$@"; }

password() {
	[ -e secrets/redis_password ] && return
	mkdir -p secrets
	(umask 077 && head -c 24 /dev/urandom | base64 | tr -d '+/=\n' > secrets/redis_password)
	own secrets/redis_password
}

# It talks on stderr even where all is well.
openssl_quietly() { said=$(openssl "$@" 2>&1) || { say "openssl failed:"; say "$said"; exit 1; }; }

# A CA of this installation's own, and the certificate of the host that runs Redis, for ten years.
certificates() {
	command -v openssl >/dev/null || { say "no openssl: install it (on Debian or Ubuntu apt-get install openssl)"; exit 1; }
	host=${1#[}; host=${host%]} # Around an IPv6 address, as in a URL.
	case $host in *:*) name=IP:$host ;; *[!0-9.]*) name=DNS:$host ;; *) name=IP:$host ;; esac
	mkdir -p secrets
	cd secrets
	umask 077
	new="req -newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes"
	# Every other host trusts this one.
	if [ -e redis_ca ]; then
		[ -e ca_key ] || { say "secrets/redis_ca has lost its ca_key: put that back, or remove redis_ca for a new CA," \
			"whose redis_ca every other host then needs"; exit 2; }
		say "with the CA that is in secrets/; Redis takes its new certificate at the next make down and make up"
	else
		openssl_quietly $new -x509 -days 3650 -subj "/CN=ruiji's own CA" -keyout ca_key -out redis_ca
	fi
	openssl_quietly $new -subj "/CN=$host" -keyout new_key -out request
	echo "subjectAltName=$name,DNS:redis,DNS:localhost,IP:127.0.0.1" > extensions
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

compose_files() {
	files=docker-compose.yml
	[ -z "${GPU:-}" ] || files=$files:docker-compose.gpu.yml
	[ -z "$(setting REDIS_HOST)" ] || files=$files:docker-compose.hosts.yml
	echo "$files"
}

compose_up() {
	if [ ! -e .env ] && [ -z "${RUIJI_MEDIA_DIR:-}" ]; then
		say "no .env: copy .env.example to it, and set the three paths in it"
		exit 2
	fi
	[ -n "$(setting COMPOSE_FILE)" ] || { COMPOSE_FILE=$(compose_files); export COMPOSE_FILE; }
	CONTAINER_USER=$(container_user); export CONTAINER_USER
	mkdir -p .up
	{
		echo mode="$1"
		for name in COMPOSE_FILE CONTAINER_USER REDIS_HOST; do
			[ -z "$(setting $name)" ] || echo "export $name='$(setting $name)'"
		done
	} > $note
	say "with docker compose ($(setting COMPOSE_FILE)), as $CONTAINER_USER"
	config=$(docker compose config)
	features=$(echo "$config" | sed -n 's/^ *RUIJI_FEATURE_DIR: //p' | head -1)
	[ -d "$features" ] || { mkdir -p "$features"; own "$features"; }
}

# Starts or changes containers, and waits until they can take a task; says why they cannot.
compose_start() {
	docker compose up -d --wait "$@" && return
	docker compose logs --no-color --tail 5 worker reducer >&2
	exit 1
}

# --- processes on this machine ----------------------------------------------------------------------------------------

here() { say "on this machine (.venv, no containers)"; [ -x .venv/bin/ruiji ] || make --no-print-directory setup; }

# Runs until `down`, also when this terminal is closed.
background() { name=$1; shift; setsid "$@" >>.up/"$name".log 2>&1 </dev/null & echo $! > .up/"$name".pid; }

# Whether what was started under this name runs: after a reboot its number may be a stranger's.
alive() { { tr '\0' ' ' < "/proc/$(cat .up/"$1".pid)/cmdline" | grep -q "bin/ruiji $1"; } 2>/dev/null; }

end() { # a process and all that it started, in order
	if alive "$1"; then kill "$(cat .up/"$1".pid)" || true; fi
	while alive "$1"; do sleep 0.2; done
	rm -f .up/"$1".pid
}

here_up() {
	mkdir -p .up
	echo mode=here > $note
	if [ -z "$(setting RUIJI_REDIS_URL)" ] && ! alive redis; then
		: > .up/redis.log
		background redis .venv/bin/ruiji redis
		until grep -q '^Redis at' .up/redis.log; do
			kill -0 "$(cat .up/redis.pid)" 2>/dev/null || { cat .up/redis.log >&2; rm .up/redis.pid; exit 1; }
			sleep 0.2
		done
	fi
	here_scale "$1"
}

here_scale() {
	end worker
	background worker .venv/bin/ruiji worker --processes "$1"
	sleep 1
	kill -0 "$(cat .up/worker.pid)" 2>/dev/null || { tail -3 .up/worker.log >&2; exit 1; }
	say "$1 embed processes and a reducer are at work; make logs shows what they say"
}

# --- commands ---------------------------------------------------------------------------------------------------------

command=$1; shift
case $command in
up)
	if [ "$mode" = here ] || { [ -z "$mode" ] && ! engine_answers; }; then
		here
		here_up "${1:-2}"
	else
		compose_up compose
		password
		compose_start --build --scale worker="${1:-2}"
	fi ;;
join)
	[ -n "$(setting REDIS_HOST)" ] || { say "make join needs REDIS_HOST, the host with Redis"; exit 2; }
	for file in redis_password redis_ca; do
		[ -e secrets/$file ] || { say "no secrets/$file: copy it from $(setting REDIS_HOST)"; exit 2; }
	done
	compose_up join
	compose_start --build --no-deps --scale worker="${1:-2}" worker ;;
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
	here) say "on this machine"; end worker; end redis ;;
	'') say "nothing is up here" ;;
	*) say "with docker compose"; docker compose down ;;
	esac
	rm -rf .up ;;
certificates)
	CONTAINER_USER=$(container_user)
	password
	certificates "$1"
	say "secrets/: redis_password and redis_ca go to every other host; redis_key stays here, ca_key can be put away" ;;
ruiji)
	if [ -z "$mode" ] || [ "$mode" = here ]; then
		here
		exec .venv/bin/ruiji "$@"
	fi
	say "in a container of docker compose"
	if [ "$1" = list ]; then
		exec docker compose run --rm list "$@"
	fi
	# A query may lie anywhere; the container sees it under its own name.
	if [ "$1" = search ] && [ -e "${2:-}" ]; then
		query=$(realpath -- "$2"); shift 2
		exec docker compose run --rm --no-deps -v "$query:$query:ro" cli search "$query" "$@"
	fi
	exec docker compose run --rm --no-deps cli "$@" ;;
*) sed -n '2,5p' "$0" >&2; exit 2 ;;
esac
