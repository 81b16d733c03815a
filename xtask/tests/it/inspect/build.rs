//! Runs compilers, and makes sysroots from their libraries.

use std::path::{Path, PathBuf};
use std::process::Command;

use xtask_core::arch::VmArchitecture;

/// The compiler or assembler that makes an executable.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Tool {
    /// The cross-compiler for C.
    Arm,
    /// The cross-compiler for C++.
    ArmCxx,
    /// The cross-assembler. The source is the body of `main`, between saving and restoring the link register.
    ArmAsm,
    /// The host's compiler for C.
    X86,
    /// The host's compiler for C with musl.
    Musl,
    /// rustc for the cross target.
    Rust,
    /// rustc for this host.
    RustX86,
}

impl Tool {
    pub(crate) fn arch(self) -> VmArchitecture {
        match self {
            Self::Arm | Self::ArmCxx | Self::ArmAsm | Self::Rust => VmArchitecture::Aarch64,
            Self::X86 | Self::Musl | Self::RustX86 => VmArchitecture::X86_64,
        }
    }

    /// Returns whether the emulated core of the Pi 5 can run the executable.
    pub(crate) fn is_arm(self) -> bool {
        self.arch().pick(false, true)
    }

    fn command(self) -> (Command, &'static str) {
        let rustc = |target: &str| {
            let mut command = Command::new("rustc");
            command.args(["--edition", "2024", "--target", target, "-C", "opt-level=2"]);
            command
        };
        match self {
            Self::Arm => (Command::new("aarch64-linux-gnu-gcc"), "c"),
            Self::ArmCxx => (Command::new("aarch64-linux-gnu-g++"), "cc"),
            Self::ArmAsm => (Command::new("aarch64-linux-gnu-gcc"), "s"),
            Self::X86 => (Command::new("cc"), "c"),
            Self::Musl => (Command::new("musl-gcc"), "c"),
            Self::Rust => {
                let mut command = rustc("aarch64-unknown-linux-gnu");
                command.args(["-C", "linker=aarch64-linux-gnu-gcc"]);
                (command, "rs")
            }
            Self::RustX86 => (rustc("x86_64-unknown-linux-gnu"), "rs"),
        }
    }
}

/// Builds `source` in `directory` and returns the path of the executable, which is called `name`.
pub(crate) fn build(directory: &Path, name: &str, tool: Tool, flags: &str, source: &str) -> PathBuf {
    let (mut command, ending) = tool.command();
    let (text, output) = (directory.join(format!("{name}.{ending}")), directory.join(name));
    let body = match tool {
        Tool::ArmAsm => format!(
            ".text\n.globl main\n.type main, %function\nmain:\n stp x29, x30, [sp, #-16]!\n{source}\n mov w0, #0\n \
             ldp x29, x30, [sp], #16\n ret\n.size main, . - main\n.section .note.GNU-stack,\"\",%progbits\n"
        ),
        _ => source.to_owned(),
    };
    std::fs::write(&text, body).unwrap();
    if matches!(tool, Tool::Arm | Tool::ArmCxx | Tool::X86 | Tool::Musl) && !flags.contains("-O") {
        command.arg("-O2");
    }
    command.arg(&text).args(flags.split_whitespace()).arg("-o").arg(&output);
    let done = command.current_dir(directory).output().unwrap_or_else(|error| panic!("{command:?}: {error}"));
    assert!(done.status.success(), "{command:?}: {}", String::from_utf8_lossy(&done.stderr));
    output
}

/// Makes a sysroot: a directory with the libraries that programs of this compiler need, laid out as on a device.
pub(crate) fn sysroot(directory: &Path, arch: VmArchitecture) -> PathBuf {
    let compiler = arch.pick("cc", "aarch64-linux-gnu-gcc");
    let root = directory.join(format!("root-{arch}"));
    let (loader_directory, loader) = arch.profile().loader;
    let libraries = format!("/usr/lib/{}", arch.profile().multiarch);
    for made in [loader_directory, &libraries, "/etc"] {
        std::fs::create_dir_all(root.join(made.trim_matches('/'))).unwrap();
    }
    let mut names = vec!["libc.so.6", "libm.so.6", "libgcc_s.so.1", "libpthread.so.0", "libdl.so.2"];
    names.extend(arch.pick(None, Some("libstdc++.so.6")));
    for (name, place) in
        names.into_iter().map(|name| (name, libraries.as_str())).chain([(loader, loader_directory)])
    {
        let asked = Command::new(compiler).arg(format!("-print-file-name={name}")).output().unwrap();
        let found = PathBuf::from(String::from_utf8(asked.stdout).unwrap().trim());
        let found = if found.is_absolute() { found } else { Path::new(loader_directory).join(loader) };
        let to = root.join(place.trim_matches('/')).join(name);
        std::fs::copy(&found, &to).unwrap_or_else(|error| panic!("{}: {error}", found.display()));
    }
    root
}
