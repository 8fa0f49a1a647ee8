# shellcheck shell=bash
# What scripts/demo and scripts/test share: everything a fresh Debian or Ubuntu needs before iscsifuse can run.
#
# Two kinds of things are installed, and nothing twice:
#   - Debian packages: asked for with dpkg-query first; apt-get is called only when something is missing;
#   - Python packages, into .venv: a stamp in there says for which pyproject.toml, Python and folder it was filled.
# A .venv that an interrupted run left half-made (.venv/.unfinished) is thrown away. Two runs at once take turns.

TOP=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd -P)
VENV=$TOP/.venv
PYTHON=                       # what .venv is made with; pick_python decides
SUDO=()                       # how to become root
MAY_INSTALL=no                # whether we are root, or can be without a question nobody would answer
BY_HAND=                      # Debian packages that we could not install
UPDATED=no                    # whether apt-get update ran already
POLICY=/usr/sbin/policy-rc.d
POLICY_MARK="# put here by iscsifuse's scripts while they install packages"

RUN_PACKAGES=(fuse3 e2fsprogs util-linux mount)
BUILD_PACKAGES=(libfuse3-dev pkg-config gcc libc6-dev)
# What the tests run against; where one is missing, its tests skip. (tini: see scripts/test.)
# shellcheck disable=SC2034 # whoever reads this file in uses it
TEST_PACKAGES=(
    tgt istgt tshark libiscsi-bin libnbd-bin qemu-system-common qemu-utils qemu-block-extra sleuthkit ntfs-3g fdisk fio
    tini
)

# Nobody is asked anything, and standard input may be closed altogether.
{ : <&0; } 2>/dev/null || exec </dev/null
export PIP_NO_INPUT=1 PIP_DISABLE_PIP_VERSION_CHECK=1
# tgtd, mkntfs, losetup ...: not on everybody's PATH
export PATH=$PATH:/usr/local/sbin:/usr/sbin:/sbin

say() { printf '==> %s\n' "$*" >&2; }
die() { say "$*"; exit 1; }
have() { command -v "$1" >/dev/null 2>&1; }

# --- Debian packages ---------------------------------------------------------------------------------------------

find_root() {
    if ((EUID == 0)); then
        MAY_INSTALL=yes
    elif have sudo && { [[ -t 0 ]] || sudo -n true 2>/dev/null; }; then
        SUDO=(sudo)
        MAY_INSTALL=yes
    fi
}

is_installed() {
    [[ $(dpkg-query -W -f '${db:Status-Status}\n' "$1" 2>/dev/null) == installed* ]]
}

# A package's daemon must not be started just because a test wants the program. invoke-rc.d and systemd's twin of
# it both ask policy-rc.d; 101 means "no". A policy that was there before stays, whatever it says.
hold_services() {
    if [[ -e $POLICY ]] && ! grep -qF "$POLICY_MARK" "$POLICY"; then return; fi
    trap release_services EXIT
    printf '#!/bin/sh\n%s\nexit 101\n' "$POLICY_MARK" | "${SUDO[@]}" tee "$POLICY" >/dev/null
    "${SUDO[@]}" chmod 755 "$POLICY"
}

release_services() {
    if grep -qsF "$POLICY_MARK" "$POLICY"; then "${SUDO[@]}" rm -f "$POLICY"; fi
    trap - EXIT
}

# Nor at the next boot. (A unit that isn't there, or no systemd at all: nothing to do.)
disable_services() {
    local package
    have systemctl || return 0
    for package in "$@"; do
        case $package in
            tgt | istgt) "${SUDO[@]}" systemctl disable "$package.service" >/dev/null 2>&1 || true ;;
        esac
    done
}

# install_packages PACKAGE...: those that are missing. Without the right to, or where the distribution doesn't have
# one, it says so and goes on: whoever needs the package fails, or skips, with a better sentence than "apt failed".
install_packages() {
    local package missing=() available=() log
    if ! have dpkg-query || ! have apt-get; then
        BY_HAND="$BY_HAND $*"
        return
    fi
    for package in "$@"; do
        is_installed "$package" || missing+=("$package")
    done
    ((${#missing[@]})) || return 0
    if [[ $MAY_INSTALL == no ]]; then
        BY_HAND="$BY_HAND ${missing[*]}"
        return
    fi

    say "installing Debian packages: ${missing[*]}"
    log=$(mktemp)
    if [[ $UPDATED == no ]]; then
        "${SUDO[@]}" apt-get -o DPkg::Lock::Timeout=300 update </dev/null >"$log" 2>&1 ||
            { cat "$log" >&2; say "apt-get update failed; trying with the package lists as they are"; }
        UPDATED=yes
    fi
    for package in "${missing[@]}"; do
        if [[ -n $(apt-cache show --no-all-versions "$package" 2>/dev/null) ]]; then
            available+=("$package")
        else
            BY_HAND="$BY_HAND $package"
        fi
    done
    if ((${#available[@]})); then
        hold_services
        if ! "${SUDO[@]}" env DEBIAN_FRONTEND=noninteractive APT_LISTCHANGES_FRONTEND=none NEEDRESTART_MODE=l \
            apt-get -o DPkg::Lock::Timeout=300 -o Dpkg::Use-Pty=0 install -y --no-install-recommends \
            "${available[@]}" </dev/null >"$log" 2>&1; then
            cat "$log" >&2
            BY_HAND="$BY_HAND ${available[*]}"
        else
            disable_services "${available[@]}"
        fi
        release_services
    fi
    rm -f "$log"
}

# --- Python ------------------------------------------------------------------------------------------------------

is_new_enough() { have "$1" && "$1" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; }

# pyfuse3 may come as source: then a Python is of use only with its own headers. Debian ships venv separately, too.
is_complete() {
    "$1" -c '
import pathlib, sys, sysconfig
import ensurepip, venv
sys.exit(not pathlib.Path(sysconfig.get_path("include"), "Python.h").exists())' 2>/dev/null
}

# Sets PYTHON. The distribution's own comes first: set_up had the packages installed that complete it.
pick_python() {
    local candidate series
    for candidate in /usr/bin/python3 python3.14 python3.13 python3.12 python3.11 python3; do
        if is_new_enough "$candidate" && is_complete "$candidate"; then
            PYTHON=$(command -v "$candidate")
            return
        fi
    done
    # A second Python beside an older default (python3.11 on Ubuntu 22.04) has packages of its own.
    for candidate in /usr/bin/python3.{14,13,12,11}; do
        is_new_enough "$candidate" || continue
        series=${candidate##*/}
        install_packages "$series-venv" "$series-dev"
        if is_complete "$candidate"; then
            PYTHON=$candidate
            return
        fi
    done
    explain_by_hand
    die "iscsifuse needs Python 3.11 or newer with its venv module and its headers, and none was found"
}

# What .venv depends on: a change of any of these fills it anew.
venv_key() {
    { cat "$TOP/pyproject.toml" "$TOP"/iscsifuse/*.c; "$VENV/bin/python" -VV; printf '%s\n' "$VENV"; } | sha256sum | cut -d' ' -f1
}

venv_is_sound() {
    [[ ! -e $VENV/.unfinished ]] &&
        "$VENV/bin/python" -c 'import sys, pip; sys.exit(sys.version_info < (3, 11))' 2>/dev/null &&
        grep -qsF "$VENV" "$VENV/bin/activate" # or else it was copied from another folder, and still means that one
}

# venv_is_filled EXTRA: "" for what running needs, "dev" for what developing needs (which is more).
venv_is_filled() {
    local stamp key
    venv_is_sound && [[ -x $VENV/bin/iscsifuse ]] || return 1
    key=$(venv_key)
    for stamp in "$VENV/.filled-${1:-run}" "$VENV/.filled-dev"; do
        if [[ -e $stamp && $(<"$stamp") == "$key" ]]; then return 0; fi
    done
    return 1
}

fill_venv() {
    local extra=$1 log
    if ! venv_is_sound; then
        pick_python
        if [[ -e $VENV ]]; then
            say "the .venv here is unfinished, broken or made for another folder: making it anew"
            rm -rf "$VENV"
        fi
        say "making .venv with $PYTHON ($("$PYTHON" -V))"
        mkdir "$VENV"
        : >"$VENV/.unfinished"
        "$PYTHON" -m venv "$VENV" || die "$PYTHON -m venv failed"
    fi
    : >"$VENV/.unfinished"
    say "installing Python packages into .venv: iscsifuse${extra:+[$extra]} and what it depends on"
    log=$(mktemp)
    if ! "$VENV/bin/python" -m pip install --editable "$TOP${extra:+[$extra]}" </dev/null >"$log" 2>&1; then
        cat "$log" >&2
        explain_by_hand
        die "pip could not install the Python packages"
    fi
    rm -f "$log"
    # An extension can be built, and still miss its library.
    "$VENV/bin/python" -c 'import crc32c, pyfuse3, trio' || die "the Python packages are installed, but don't load"
    venv_key >"$VENV/.filled-${extra:-run}"
    rm "$VENV/.unfinished"
}

explain_by_hand() {
    [[ -n $BY_HAND ]] || return 0
    say "could not install$BY_HAND (no root, no apt-get, or not in this distribution): please install by hand"
    BY_HAND=
}

# set_up EXTRA PACKAGE...: all of the above, with as few calls of apt-get and pip as possible (mostly none).
set_up() {
    local extra=$1 lock packages filled=no
    packages=("${RUN_PACKAGES[@]}" "${@:2}")
    find_root
    exec {lock}>"$TOP/.venv.lock"
    if have flock && ! flock --nonblock "$lock"; then
        say "another run is installing; waiting for it"
        flock "$lock"
    fi
    if venv_is_filled "$extra"; then
        filled=yes
    else
        packages+=("${BUILD_PACKAGES[@]}")
        if [[ ! -e /usr/bin/python3 ]] || is_new_enough /usr/bin/python3; then
            packages+=(python3 python3-venv python3-dev)
        fi
    fi
    install_packages "${packages[@]}"
    [[ $filled == yes ]] || fill_venv "$extra"
    exec {lock}>&-
    explain_by_hand
}
