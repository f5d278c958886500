#!/bin/sh
# Entrypoint of the grafana service: start.sh [COMMAND]; the default is the image's /run.sh.
# There is no default password or key. The first start generates both at random, keeps them in Grafana's volume and
# never prints them. GF_SECURITY_ADMIN_PASSWORD and GF_SECURITY_SECRET_KEY, or their __FILE variants, override them.
set -eu

data="${GF_PATHS_DATA:-/var/lib/grafana}"

make_secret() {
    if [ ! -s "$1" ]; then
        (umask 077 && head -c 24 /dev/urandom | base64 | tr '+/' '-_' > "$1.new")
        mv "$1.new" "$1"
    fi
}

if [ -z "${GF_SECURITY_SECRET_KEY:-}${GF_SECURITY_SECRET_KEY__FILE:-}" ]; then
    make_secret "$data/secret-key"
    export GF_SECURITY_SECRET_KEY__FILE="$data/secret-key"
fi
if [ -z "${GF_SECURITY_ADMIN_PASSWORD:-}${GF_SECURITY_ADMIN_PASSWORD__FILE:-}" ]; then
    make_secret "$data/admin-password"
    export GF_SECURITY_ADMIN_PASSWORD__FILE="$data/admin-password"
    echo "Grafana's user is admin; its password: docker compose exec grafana cat $data/admin-password"
fi
exec "${@:-/run.sh}"
