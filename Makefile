# Everything that is installed: the command, the C library, their manual pages and completions.
#
#   make && sudo make install && sudo ldconfig     DESTDIR= PREFIX=/usr/local LIBDIR=PREFIX/lib
#   make deb                                       libsoccr1, libsoccr-dev and soccr, in target/deb
#   make static                                    the command alone, for any Linux of this architecture, in target/static
#
# Only `make` runs cargo: `make install` copies what is there.

PREFIX ?= /usr/local
BINDIR ?= $(PREFIX)/bin
MANDIR ?= $(PREFIX)/share/man
BASH_COMPLETIONS ?= $(PREFIX)/share/bash-completion/completions
ZSH_COMPLETIONS ?= $(PREFIX)/share/zsh/site-functions
FISH_COMPLETIONS ?= $(PREFIX)/share/fish/vendor_completions.d
CARGO ?= cargo
# "dev" builds faster.
PROFILE ?= release

CARGO_TARGET_DIR ?= $(abspath target)
export CARGO_TARGET_DIR
SOCCR := $(CARGO_TARGET_DIR)/$(patsubst dev,debug,$(PROFILE))/soccr
PAGES := $(CARGO_TARGET_DIR)/pages

all:
	$(MAKE) -C crates/libsoccr
	$(CARGO) build --profile $(PROFILE) --package soccr-cli --bin soccr
	rm -rf $(PAGES)
	$(SOCCR) man $(PAGES)/man1
	$(SOCCR) completions bash > $(PAGES)/soccr.bash
	$(SOCCR) completions zsh > $(PAGES)/_soccr
	$(SOCCR) completions fish > $(PAGES)/soccr.fish

install:
	@test -x $(SOCCR) -a -d $(PAGES) || { echo "nothing is built yet: run make first" >&2; exit 1; }
	$(MAKE) -C crates/libsoccr install
	install -d $(DESTDIR)$(BINDIR) $(DESTDIR)$(MANDIR)/man1
	install -d $(DESTDIR)$(BASH_COMPLETIONS) $(DESTDIR)$(ZSH_COMPLETIONS) $(DESTDIR)$(FISH_COMPLETIONS)
	install -m 755 $(SOCCR) $(DESTDIR)$(BINDIR)
	install -m 644 $(PAGES)/man1/*.1 $(DESTDIR)$(MANDIR)/man1
	install -m 644 $(PAGES)/soccr.bash $(DESTDIR)$(BASH_COMPLETIONS)/soccr
	install -m 644 $(PAGES)/_soccr $(DESTDIR)$(ZSH_COMPLETIONS)
	install -m 644 $(PAGES)/soccr.fish $(DESTDIR)$(FISH_COMPLETIONS)

deb: all
	CARGO_TARGET_DIR=$(CARGO_TARGET_DIR) PROFILE=$(PROFILE) ./deb.sh

# Needs `rustup target add` of this target.
STATIC := $(shell uname -m)-unknown-linux-musl
static:
	$(CARGO) build --locked --profile $(PROFILE) --package soccr-cli --bin soccr --target $(STATIC)
	install -D $(CARGO_TARGET_DIR)/$(STATIC)/$(patsubst dev,debug,$(PROFILE))/soccr $(CARGO_TARGET_DIR)/static/soccr

bench:
	$(MAKE) -C crates/libsoccr bench

.PHONY: all install deb static bench
