#!/bin/sh
# The proxy that docs/ui.md describes, for the tests: the system's nginx, else Debian's package.
set -eu
[ -x /usr/sbin/nginx ] && exit 0
as_root=""
[ "$(id -u)" = 0 ] || as_root="sudo -n"
# The package would start a server on port 80; the tests start their own.
[ ! -d /run/systemd/system ] || $as_root systemctl mask nginx.service
$as_root apt-get update -qq
exec $as_root env DEBIAN_FRONTEND=noninteractive \
    apt-get install -y -qq --no-install-recommends nginx-light >/dev/null
