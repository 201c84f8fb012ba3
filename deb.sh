#!/bin/sh
# Makes Debian packages of what `make` has built: see the Makefile. Needs dpkg-deb, and no privilege.
set -eu
cd "$(dirname "$0")"

out=$CARGO_TARGET_DIR/deb
version_of() { sed -n 's/^version = "\(.*\)"/\1/p' "$1"; }
version=$(version_of crates/libsoccr/Cargo.toml) command_version=$(version_of Cargo.toml)
architecture=$(dpkg --print-architecture)
library=/usr/lib/$(${CC:-cc} -print-multiarch 2>/dev/null || true)
maintainer="${DEBFULLNAME:-$(id -un)} <${DEBEMAIL:-$(id -un)@localhost}>"

rm -rf "$out"
mkdir -p "$out"
all=$out/all
make --no-print-directory install DESTDIR="$all" PREFIX=/usr LIBDIR="${library%/}" > /dev/null
find "$all/usr/share/man" -type f -exec gzip -9n {} +
strip --strip-unneeded "$all/usr/bin/soccr" "$all${library%/}/libsoccr.so.$version"

# The oldest C library that has every symbol in use.
libc() {
    oldest=$(objdump -T "$1" | sed -n 's/.*GLIBC_\([0-9.]*\).*/\1/p' | sort -Vu | tail -n 1)
    echo "libc6 (>= $oldest)"
}

# package NAME SECTION DEPENDS DESCRIPTION FILE...: packs these files.
package() {
    name=$1 section=$2 depends=$3 description=$4
    shift 4
    root=$out/$name
    mkdir -p "$root/DEBIAN" "$root/usr/share/doc/$name"
    (cd "$all" && for file in "$@"; do find ".$file" \( -type f -o -type l \); done) |
        tar -C "$all" -cf - -T - | tar -C "$root" -xf -
    cat LICENSE-MIT LICENSE-APACHE > "$root/usr/share/doc/$name/copyright"
    cat > "$root/DEBIAN/control" << CONTROL
Package: $name
Version: $version
Section: $section
Priority: optional
Architecture: $architecture
Maintainer: $maintainer
Depends: $depends
Installed-Size: $(du -ks "$root/usr" | cut -f 1)
Description: $description
CONTROL
    if [ "$name" = libsoccr1 ]; then
        echo "activate-noawait ldconfig" > "$root/DEBIAN/triggers"
        echo "libsoccr 1 libsoccr1 (>= $version)" > "$root/DEBIAN/shlibs"
    fi
    find "$root" -type d -exec chmod 755 {} +
    dpkg-deb --root-owner-group --build "$root" "$out" > /dev/null
    rm -rf "$root"
}

library=${library%/}
package libsoccr1 libs "$(libc "$all$library/libsoccr.so.$version")" \
    "checkpoint and restore live TCP connections: shared library" "$library/libsoccr.so.1" "$library/libsoccr.so.$version"
package libsoccr-dev libdevel "libsoccr1 (= $version), libc6-dev" \
    "checkpoint and restore live TCP connections: for C programs" /usr/include "$library/libsoccr.so" "$library/libsoccr.a" \
    "$library/pkgconfig" /usr/share/man/man3 /usr/share/man/man7
version=$command_version
package soccr net "$(libc "$all/usr/bin/soccr"), libgcc-s1" \
    "checkpoint, restore and move live TCP connections" /usr/bin /usr/share/man/man1 /usr/share/bash-completion \
    /usr/share/zsh /usr/share/fish
rm -rf "$all"
ls "$out"/*.deb
