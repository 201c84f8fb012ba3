//! What a C program sees of the library before it runs: header, symbols, soname, installed files.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::{Mutex, PoisonError};

mod common;
use common::{include, installed, run};

/// The functions that `libsoccr.map` exports.
fn exported() -> Vec<String> {
    let map = fs::read_to_string(Path::new(env!("CARGO_MANIFEST_DIR")).join("libsoccr.map")).unwrap();
    let names = map.lines().filter_map(|line| line.trim().strip_suffix(';'));
    names.filter(|name| name.starts_with("libsoccr_")).map(str::to_owned).collect()
}

/// The names of symbols that `nm` prints in its last column, without their version.
fn symbols(nm: &mut Command) -> Vec<String> {
    let name =
        |line: &str| line.split_whitespace().last().map(|name| name.split('@').next().unwrap().to_owned());
    let mut names: Vec<String> = run(nm).lines().filter_map(name).collect();
    names.retain(|name| name.starts_with("libsoccr_"));
    names.sort();
    names
}

fn source(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/c").join(name)
}

fn temporary(name: &str) -> PathBuf {
    Path::new(env!("CARGO_TARGET_TMPDIR")).join(name)
}

#[test]
fn the_header_compiles_alone_in_every_dialect() {
    // As of a C library that knows nothing of repair mode.
    let poor = temporary("poor-libc");
    fs::create_dir_all(poor.join("netinet")).unwrap();
    fs::write(
        poor.join("netinet/tcp.h"),
        "#define TCP_NODELAY 1\nenum { TCP_NO_QUEUE, TCP_RECV_QUEUE, TCP_SEND_QUEUE };\n",
    )
    .unwrap();
    let has_cpp = installed("c++");
    for (compiler, language, standard) in [
        ("cc", "c", "c99"),
        ("cc", "c", "gnu99"),
        ("cc", "c", "c17"),
        ("c++", "c++", "c++98"),
        ("c++", "c++", "gnu++98"),
        ("c++", "c++", "c++17"),
    ] {
        if compiler == "c++" && !has_cpp {
            continue;
        }
        for definition in ["-DNOTHING", "-DSOCCR_API_2016", "-D_GNU_SOURCE"] {
            for before in [None, Some("netinet/tcp.h"), Some("linux/tcp.h")] {
                let mut command = Command::new(compiler);
                command.args(["-fsyntax-only", "-Wall", "-Wextra", "-Werror", "-pedantic", definition]);
                command.args(["-x", language, &format!("-std={standard}"), "-I"]).arg(include());
                command.args(before.iter().flat_map(|header| ["-include", header]));
                run(command.arg(source("header.c")));
            }
        }
    }
    let mut command = Command::new("cc");
    command.args(["-fsyntax-only", "-Wall", "-Wextra", "-Werror", "-pedantic", "-std=gnu99", "-I"]).arg(poor);
    run(command.arg("-I").arg(include()).arg(source("header.c")));
    // It has no headers of the kernel, nor the numbers of the queues.
    if installed("musl-gcc") {
        for definition in ["-DNOTHING", "-DSOCCR_API_2016"] {
            let mut command = Command::new("musl-gcc");
            command.args(["-fsyntax-only", "-Wall", "-Wextra", "-Werror", "-std=c11", definition, "-I"]);
            run(command.arg(include()).arg(source("header.c")));
        }
    }
}

#[test]
fn the_header_declares_what_the_library_exports() {
    let mut header = fs::read_to_string(include().join("soccr.h")).unwrap();
    header = header.replace(
        "#define libsoccr_set_queue_bytes libsoccr_set_queue_bytes_2016",
        "libsoccr_set_queue_bytes_2016(",
    );
    for name in exported() {
        assert!(header.contains(&format!("{name}(")), "{name}");
    }
}

/// One `make` at a time: they write the same files.
static MAKING: Mutex<()> = Mutex::new(());

/// The workspace's Makefile, for libraries and a command that are quickly built.
fn make(target: &str) -> Command {
    let mut make = Command::new("make");
    let workspace = Path::new(env!("CARGO_MANIFEST_DIR")).join("../..");
    make.args(["--silent", target, "PROFILE=dev", "-C"]).arg(workspace);
    make.env("CARGO", env!("CARGO")).env_remove("MAKEFLAGS").env_remove("MAKELEVEL");
    make.env("CARGO_TARGET_DIR", Path::new(env!("CARGO_TARGET_TMPDIR")).parent().unwrap());
    make
}

#[test]
fn the_installed_library_needs_nothing_but_libc() {
    if !installed("make") || !installed("pkg-config") {
        return;
    }
    let _making = MAKING.lock().unwrap_or_else(PoisonError::into_inner);
    let root = temporary("installed");
    let _ = fs::remove_dir_all(&root);
    run(&mut make("all"));
    // As by `sudo make install`: there is no cargo for it.
    let mut install = make("install");
    run(install.env("CARGO", "false").arg(format!("DESTDIR={}", root.display())).arg("PREFIX=/opt/soccr"));

    let lib = root.join("opt/soccr/lib");
    let shared = lib.join("libsoccr.so");
    assert_eq!(fs::canonicalize(&shared).unwrap().file_name().unwrap(), "libsoccr.so.1.0.0");
    assert_eq!(fs::read_link(&shared).unwrap(), Path::new("libsoccr.so.1"));
    let versioned = run(Command::new("nm").args(["-D", "--defined-only"]).arg(&shared));
    for name in exported() {
        assert!(versioned.contains(&format!("{name}@@LIBSOCCR_1.0")), "{versioned}");
    }
    assert_eq!(symbols(Command::new("nm").args(["-D", "--defined-only"]).arg(&shared)), exported());
    let dynamic = run(Command::new("readelf").arg("-dW").arg(&shared));
    assert!(dynamic.contains("soname: [libsoccr.so.1]"), "{dynamic}");
    for line in dynamic.lines().filter(|line| line.contains("(NEEDED)")) {
        let known = ["libc.so", "ld-linux"].iter().any(|known| line.contains(known));
        assert!(known, "{line}");
    }

    // Nothing else is visible, so that two libraries written in Rust can go into one program.
    let archive = lib.join("libsoccr.a");
    let globals = run(Command::new("nm").args(["-g", "--defined-only", "--format=posix"]).arg(&archive));
    assert_eq!(
        globals.lines().filter(|line| line.split(' ').count() > 1).count(),
        exported().len(),
        "{globals}"
    );
    for file in [
        "bin/soccr",
        "share/man/man7/soccr.7",
        "share/man/man3/libsoccr_pause.3",
        "share/man/man1/soccr.1",
        "share/man/man1/soccr-save.1",
        "share/bash-completion/completions/soccr",
        "share/zsh/site-functions/_soccr",
        "share/fish/vendor_completions.d/soccr.fish",
    ] {
        assert!(root.join("opt/soccr").join(file).exists(), "{file}");
    }

    let pkg_config = |argument: &str| {
        let mut command = Command::new("pkg-config");
        command.env("PKG_CONFIG_SYSROOT_DIR", &root).env("PKG_CONFIG_LIBDIR", lib.join("pkgconfig"));
        let flags = run(command.args([argument, "--cflags", "--libs", "libsoccr"]));
        flags.split_whitespace().map(str::to_owned).collect::<Vec<_>>()
    };
    for (linking, argument) in [("-pie", "--shared"), ("-static", "--static")] {
        let program = temporary("linked").with_extension(&linking[1..]);
        let mut cc = Command::new("cc");
        run(cc
            .args(["-std=c11", linking, "-o"])
            .arg(&program)
            .arg(source("abi.c"))
            .args(pkg_config(argument)));
        let printed = run(Command::new(&program).env("LD_LIBRARY_PATH", &lib));
        assert_eq!(printed, "pause: -1 is no descriptor\n");
    }
}

#[test]
fn debian_packages_install() {
    if !installed("make") || !installed("dpkg-deb") {
        return;
    }
    let _making = MAKING.lock().unwrap_or_else(PoisonError::into_inner);
    let packages = run(&mut make("deb"));
    let packages: Vec<&str> = packages.split_whitespace().collect();
    assert_eq!(packages.len(), 3, "{packages:?}");

    let root = temporary("debian");
    let _ = fs::remove_dir_all(&root);
    fs::create_dir_all(root.join("var/lib/dpkg")).unwrap();
    fs::write(root.join("var/lib/dpkg/status"), "").unwrap();
    // Files of root need root, or a namespace in which the user is that.
    let mut dpkg = Command::new("unshare");
    dpkg.args([
        "--map-root-user",
        "dpkg",
        "--force-not-root",
        "--force-depends",
        "--log=/dev/null",
        "--root",
    ]);
    if Command::new("unshare").args(["--map-root-user", "true"]).status().is_ok_and(|status| status.success())
    {
        run(dpkg.arg(&root).arg("--install").args(&packages));
    } else {
        soccr_lab::skip("this machine forbids user namespaces, the packages were made but not installed");
        return;
    }
    let mut dpkg_query = Command::new("dpkg-query");
    let listed = run(dpkg_query.arg("--admindir").arg(root.join("var/lib/dpkg")).args([
        "--showformat",
        "${Package} ${Status}\n",
        "--show",
    ]));
    for package in ["libsoccr1", "libsoccr-dev", "soccr"] {
        assert!(listed.contains(&format!("{package} install ok installed")), "{listed}");
    }
    run(Command::new(root.join("usr/bin/soccr")).arg("--version"));
    assert!(root.join("usr/include/soccr.h").exists());
    assert!(root.join("usr/share/man/man1/soccr.1.gz").exists());
}
