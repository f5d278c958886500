#!/bin/sh
# Entrypoint of the grafana service: start.sh COMMAND. There is no default password: on first use a random one is made for
# the user admin, kept in Grafana's own volume, and never printed. GF_SECURITY_ADMIN_PASSWORD, or …__FILE, sets another.
set -eu

secret="${GF_PATHS_DATA:-/var/lib/grafana}/admin-password"
if [ -z "${GF_SECURITY_ADMIN_PASSWORD:-}${GF_SECURITY_ADMIN_PASSWORD__FILE:-}" ]; then
    if [ ! -s "$secret" ]; then
        (umask 077 && head -c 24 /dev/urandom | base64 | tr '+/' '-_' > "$secret.new")
        mv "$secret.new" "$secret"
    fi
    export GF_SECURITY_ADMIN_PASSWORD__FILE="$secret"
    echo "Grafana's user is admin; its password: docker compose exec grafana cat $secret"
fi
exec "$@"
