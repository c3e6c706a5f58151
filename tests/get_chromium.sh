#!/bin/sh
# A browser for the page's tests: the system's, else Debian's package, else Playwright's own download.
set -eu
[ -x /usr/bin/chromium ] && exit 0
if command -v apt-get >/dev/null 2>&1; then
    as_root=""
    [ "$(id -u)" = 0 ] || as_root="sudo -n"
    $as_root apt-get update -qq && $as_root env DEBIAN_FRONTEND=noninteractive \
        apt-get install -y -qq --no-install-recommends chromium fonts-dejavu-core >/dev/null && exit 0
fi
exec "${PYTHON:-python3}" -m playwright install --with-deps chromium
