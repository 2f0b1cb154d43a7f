//! Compiles the programs of the kernel path (src/kernel/bpf) with clang.

use std::{
    env, fs,
    path::{Path, PathBuf},
    process::{Command, exit},
};

const FOLDER: &str = "src/kernel/bpf";
const SOURCE: &str = "src/kernel/bpf/programs.c";

fn main() {
    println!("cargo::rerun-if-changed=build.rs");
    println!("cargo::rerun-if-changed={FOLDER}");
    println!("cargo::rerun-if-env-changed=CLANG");
    let out = PathBuf::from(env::var_os("OUT_DIR").expect("cargo sets OUT_DIR"));
    let arch = env::var("CARGO_CFG_TARGET_ARCH").expect("cargo sets the target's architecture");
    let clang = env::var_os("CLANG").unwrap_or_else(|| "clang".into());
    let object = out.join("programs.o");
    let mut command = Command::new(&clang);
    // -g for the types of the maps (BTF). Only v4 needs more than Linux 5.15.
    command.args(["-target", "bpf", "-mcpu=v2", "-O2", "-g", "-Wall", "-Werror"]);
    // Debian has the kernel's headers of an architecture in a folder of its own: that of this machine, and that of its cross compiler.
    for folder in
        [format!("/usr/include/{arch}-linux-gnu"), format!("/usr/{arch}-linux-gnu/include")]
    {
        command.arg("-idirafter").arg(folder);
    }
    // The same bytes wherever they are built.
    command
        .arg(format!("-ffile-prefix-map={}=.", env::var("CARGO_MANIFEST_DIR").unwrap_or_default()));
    command.args(["-c", SOURCE, "-o"]).arg(&object);
    match command.output() {
        Ok(output) if output.status.success() => {}
        Ok(output) => fail(&format!(
            "clang cannot compile {SOURCE}{}:\n{}",
            if has_headers() {
                ""
            } else {
                ": install the packages libbpf-dev and linux-libc-dev (Debian)"
            },
            String::from_utf8_lossy(&output.stderr)
        )),
        Err(error) => fail(&format!(
            "cannot run {}: {error}; it compiles {SOURCE}: install the packages clang and libbpf-dev (Debian), or set CLANG",
            Path::new(&clang).display()
        )),
    }
}

fn has_headers() -> bool {
    ["bpf/bpf_helpers.h", "linux/bpf.h"]
        .iter()
        .all(|header| fs::metadata(Path::new("/usr/include").join(header)).is_ok())
}

fn fail(text: &str) -> ! {
    println!("cargo::error={}", text.replace('\n', " | "));
    eprintln!("{text}");
    exit(1)
}
