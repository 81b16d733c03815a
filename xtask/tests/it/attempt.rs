//! Tests `try` with real machines: the end of the program, its output and its input, the core and the kernel of the
//! device, and that nothing is left after an interrupt or a kill. The kernel is that of this user's cache, and is
//! downloaded once.

use std::io::{Read as _, Write as _};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::time::Duration;

use rustix::process::Signal;
use serde_json::Value;
use xtask_core::cache::Cache;
use xtask_core::fs::{directories, make_private_dir};
use xtask_core::processes::owned;

mod images;

use crate::scratch::{Scratch, XTASK_TRY, assert_code, message, signal, wait_until};

/// The limit of a wait for an event, on a busy host.
const LIMIT: Duration = Duration::from_secs(300);

/// A directory with programs, and a cache with this user's kernels.
struct Place {
    scratch: Scratch,
}

impl Place {
    fn new() -> Self {
        let scratch = Scratch::new();
        let kernels = Cache::from_env().unwrap().kernels();
        make_private_dir(&kernels).unwrap();
        std::os::unix::fs::symlink(kernels, scratch.cache().join("kernels")).unwrap();
        std::fs::create_dir(scratch.path().join("programs")).unwrap();
        Self { scratch }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.scratch.path().join("programs").join(name)
    }

    /// Compiles a program for the Pi 5.
    fn compile(&self, name: &str, flags: &[&str], source: &str) -> PathBuf {
        let (text, path) = (self.path(&format!("{name}.c")), self.path(name));
        std::fs::write(&text, source).unwrap();
        let mut compiler = Command::new("aarch64-linux-gnu-gcc");
        let output = compiler.args(flags).arg("-o").arg(&path).arg(&text).output().unwrap();
        assert!(output.status.success(), "{}", message(&output));
        path
    }

    fn command(&self, program: &Path, flags: &[&str], arguments: &[&str]) -> Command {
        let mut command = self.scratch.command(XTASK_TRY, &["try"]);
        command.args(flags).arg(program).arg("--").args(arguments);
        command
    }

    fn run(&self, program: &Path, flags: &[&str], arguments: &[&str]) -> Output {
        self.command(program, flags, arguments).stdin(Stdio::null()).output().unwrap()
    }

    /// Starts a program, and waits until it has printed its first byte.
    fn start(&self, program: &Path) -> Child {
        let mut command = self.command(program, &["--quiet"], &[]);
        let mut child = command.stdin(Stdio::null()).stdout(Stdio::piped()).spawn().unwrap();
        child.stdout.as_mut().unwrap().read_exact(&mut [0; 1]).unwrap();
        child
    }

    /// Runs a program with `--report`, and returns the report, too.
    fn report(&self, program: &Path, flags: &[&str]) -> (Output, Value) {
        let path = self.scratch.path().join("report.json");
        let output = self.run(program, &[flags, &["--report", path.to_str().unwrap()]].concat(), &[]);
        let report: Value = serde_json::from_slice(&std::fs::read(path).unwrap()).unwrap();
        assert_eq!(report["exit_code"], output.status.code().unwrap(), "{report}");
        (output, report)
    }

    fn runs(&self) -> Vec<PathBuf> {
        directories(&self.scratch.cache().join("runs"))
    }
}

fn stdout(output: &Output) -> String {
    String::from_utf8_lossy(&output.stdout).into_owned()
}

fn stderr(output: &Output) -> String {
    String::from_utf8_lossy(&output.stderr).into_owned()
}

const ECHO: &str = r#"#include <stdio.h>
#include <stdlib.h>
#include <unistd.h>
int main(int argc, char **argv) {
    char line[64] = "", here[64];
    fgets(line, sizeof line, stdin);
    FILE *file = fopen("written", "w");
    printf("%ld %ld %s %s %s %s %s", sysconf(_SC_PAGESIZE), sysconf(_SC_NPROCESSORS_ONLN), argv[0], argv[argc - 1], getenv("WORD"), getcwd(here, 64), line);
    fprintf(stderr, "to stderr\n");
    return file ? 7 : 8;
}
"#;

#[test]
fn the_program_ends_as_on_the_device() {
    let place = Place::new();
    let echo = place.compile("echo", &["-static"], ECHO);
    let report = place.path("report.json");
    let flags = ["--env", "WORD=w", "--report", report.to_str().unwrap()];
    let mut command = place.command(&echo, &flags, &["a b"]);
    let mut child =
        command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
    child.stdin.take().unwrap().write_all(b"typed\n").unwrap();
    let output = child.wait_with_output().unwrap();
    assert_code(&output, 7);
    assert_eq!(stdout(&output), "16384 2 /try/echo a b w /try typed\n");
    assert!(stderr(&output).contains("to stderr"), "{}", stderr(&output));
    let report: Value = serde_json::from_slice(&std::fs::read(report).unwrap()).unwrap();
    assert_eq!((&report["outcome"], &report["code"]), (&"exited".into(), &7.into()), "{report}");
    assert_eq!(report["stderr"], "to stderr\n");
    assert!(!place.path("written").exists(), "the program wrote to this host");
    // A closed standard input is an empty one.
    let mut shell = place.scratch.command("sh", &["-c", r#"exec "$0" try --quiet "$1" <&-"#, XTASK_TRY]);
    let output = shell.arg(&echo).output().unwrap();
    assert_code(&output, 7);
    assert!(stdout(&output).ends_with("/try "), "{}", message(&output));
    assert!(place.runs().is_empty(), "a finished attempt leaves nothing");
}

#[test]
fn an_instruction_that_the_core_lacks_and_a_segment_for_small_pages_fail() {
    let place = Place::new();
    let source =
        |instruction: &str| format!("int main(void) {{ __asm__ volatile({instruction:?}); return 0; }}\n");
    for (name, instruction) in
        [("mte", ".arch armv8.5-a+memtag\nstg sp, [sp]"), ("sve", ".arch armv8.2-a+sve\nptrue p0.b")]
    {
        let (output, report) = place.report(&place.compile(name, &["-static"], &source(instruction)), &[]);
        assert_code(&output, 132);
        assert_eq!((&report["outcome"], &report["signal"]), (&"signal".into(), &"SIGILL".into()), "{report}");
        assert!(stderr(&output).contains("signal 4 (SIGILL, illegal instruction)"), "{}", message(&output));
    }
    // The offsets and the addresses of the segments agree within 4 KiB, but not within 16 KiB.
    let small = ["-Wl,-z,max-page-size=4096", "-Wl,-z,common-page-size=4096"];
    let small = place.compile("small-pages", &small, "int main(void) { return 0; }\n");
    let output = place.run(&small, &["--sysroot", "/usr/aarch64-linux-gnu"], &[]);
    assert_code(&output, 139);
    assert!(stderr(&output).contains("signal 11 (SIGSEGV"), "{}", message(&output));
}

/// Runs on the machine of the other architecture, whose bus, console and firmware are different.
#[test]
fn a_program_for_x86_ends_as_on_such_a_device() {
    let place = Place::new();
    // AVX is not a part of x86-64-v2. Another process executes it, so that one boot is enough.
    let text = r#"#include <stdio.h>
#include <sys/wait.h>
#include <unistd.h>
int main(int argc, char **argv) {
    int status = 0;
    if (fork() == 0) { __asm__ volatile("vpxor %ymm0, %ymm0, %ymm0"); _exit(0); }
    wait(&status);
    printf("%s %d\n", argv[1], WTERMSIG(status));
    return 9;
}
"#;
    let (source, program) = (place.path("x86.c"), place.path("x86"));
    std::fs::write(&source, text).unwrap();
    let mut compiler = Command::new("cc");
    let output = compiler.arg("-static").arg("-o").arg(&program).arg(&source).output().unwrap();
    assert!(output.status.success(), "{}", message(&output));
    let output = place.run(&program, &["--device", "x86-64-v2"], &["a"]);
    assert_code(&output, 9);
    assert_eq!(stdout(&output), "a 4\n");
    assert!(stderr(&output).contains("pages of 4 KiB, on x86-64-v2"), "{}", stderr(&output));
}

#[test]
fn a_megabyte_of_output_is_complete_and_in_order() {
    let place = Place::new();
    let source = "#include <stdio.h>\nint main(void) { for (int i = 0; i < 150000; i++) { printf(\"%07d\\n\", i);\n\
                  if (i % 1000 == 0) fprintf(stderr, \"e%d\\n\", i); } return 0; }\n";
    let output = place.run(&place.compile("lines", &["-static"], source), &["--quiet"], &[]);
    assert_code(&output, 0);
    let expected: String = (0..150_000).map(|number| format!("{number:07}\n")).collect();
    assert!(stdout(&output) == expected, "{} bytes, expected {}", output.stdout.len(), expected.len());
    let expected: String = (0..150).map(|number| format!("e{}\n", number * 1000)).collect();
    assert_eq!(stderr(&output), expected);
}

#[test]
fn a_program_whose_output_has_no_reader_gets_sigpipe() {
    let place = Place::new();
    let source = "#include <stdio.h>\nint main(void) { for (;;) if (puts(\"y\") < 0) return 5; }\n";
    // Closes the program's output after the first byte.
    let mut child = place.start(&place.compile("endless", &["-static"], source));
    drop(child.stdout.take());
    assert_eq!(child.wait().unwrap().code(), Some(141));
}

/// A pager may wait for a key for as long as it likes.
#[test]
fn an_attempt_whose_reader_waits_can_be_interrupted() {
    let place = Place::new();
    let source = "#include <stdio.h>\nint main(void) { for (;;) puts(\"0123456789abcdef\"); }\n";
    let mut child = place.start(&place.compile("endless", &["-static"], source));
    let pipe = child.stdout.take().unwrap();
    // A pipe has 64 KiB (pipe(7)).
    let is_full = || rustix::io::ioctl_fionread(&pipe).unwrap() > 60_000;
    wait_until("the pipe is full", LIMIT, is_full);
    signal(&child, Signal::TERM);
    wait_until("the attempt ends", LIMIT, || child.try_wait().unwrap().is_some());
    assert_eq!(child.wait().unwrap().code(), Some(130));
}

#[test]
fn a_program_that_uses_up_the_memory_is_told_from_one_that_a_signal_ends() {
    let place = Place::new();
    let source = "#include <stdlib.h>\n#include <string.h>\n\
                  int main(void) { for (;;) memset(malloc(1 << 20), 1, 1 << 20); }\n";
    let (output, report) = place.report(&place.compile("greedy", &["-static"], source), &[]);
    assert_code(&output, 137);
    assert_eq!(report["outcome"], "out-of-memory");
    assert!(stderr(&output).contains("the machine's memory of 2048 MiB was full"), "{}", message(&output));
}

#[test]
fn links_of_a_sysroot_lead_into_it() {
    let place = Place::new();
    let root = place.scratch.path().join("root");
    for directory in ["bin", "run"] {
        std::fs::create_dir_all(root.join(directory)).unwrap();
    }
    let source = "#include <stdio.h>\nint main(int argc, char **argv) { char line[64] = \"\";\n\
                  FILE *file = fopen(\"/etc/hosts\", \"r\"); if (file) fgets(line, sizeof line, file);\n\
                  printf(\"%s %s\", argv[0], line); return 7; }\n";
    std::fs::rename(place.compile("names", &["-static"], source), root.join("run/names")).unwrap();
    // On this host, these links lead nowhere.
    std::os::unix::fs::symlink("/run/names", root.join("bin/link")).unwrap();
    std::os::unix::fs::symlink("/var/tmp", root.join("tmp")).unwrap();
    let output = place.run(&root.join("bin/link"), &["--sysroot", root.to_str().unwrap()], &[]);
    assert_code(&output, 7);
    assert_eq!(stdout(&output), "/bin/link 127.0.0.1 localhost\n");
}

const SLEEPS: &str = "#include <stdio.h>\n#include <unistd.h>\n\
                      int main(void) { puts(\"up\"); fflush(stdout); for (;;) pause(); }\n";

#[test]
fn an_attempt_that_is_stopped_leaves_nothing() {
    let place = Place::new();
    let sleeps = place.compile("sleeps", &["-static"], SLEEPS);
    let (output, report) = place.report(&sleeps, &["--timeout", "2"]);
    assert_code(&output, 124);
    assert_eq!(report["outcome"], "timed-out");
    assert!(stderr(&output).contains("still running after 2 s"), "{}", message(&output));
    let mut child = place.start(&sleeps);
    let work = place.runs()[0].join("w");
    let processes = owned(&work);
    assert!(!processes.is_empty(), "QEMU is not recorded");
    signal(&child, Signal::INT);
    assert_eq!(child.wait().unwrap().code(), Some(130));
    assert!(
        place.runs().is_empty() && !processes.iter().any(|process| process.signal(Signal::CONT).unwrap())
    );
    // After a kill, QEMU ends by itself, and the next attempt deletes the directory.
    let mut child = place.start(&sleeps);
    let dead = place.runs()[0].clone();
    let processes = owned(&dead.join("w"));
    child.kill().unwrap();
    child.wait().unwrap();
    wait_until("QEMU ends", LIMIT, || !processes.iter().any(|process| process.signal(Signal::CONT).unwrap()));
    assert!(dead.exists());
    assert_code(&place.run(&sleeps, &["--timeout", "1"], &[]), 124);
    assert!(place.runs().is_empty());
}

#[test]
fn a_kernel_that_panics_says_nothing_about_the_program() {
    let place = Place::new();
    let source = "#include <stdio.h>\nint main(void) { FILE *f = fopen(\"/proc/sysrq-trigger\", \"w\");\n\
                  if (!f) return 3; fputs(\"c\", f); fclose(f); return 4; }\n";
    let (output, report) = place.report(&place.compile("panics", &["-static"], source), &[]);
    assert_code(&output, 69);
    assert_eq!(report["outcome"], "lost");
    let text = stderr(&output);
    assert!(text.contains("Kernel panic") && text.contains("says nothing about the program"), "{text}");
}

#[test]
fn a_dynamic_program_runs_with_a_sysroot_and_needs_its_loader() {
    let place = Place::new();
    let dynamic = place.compile(
        "dynamic",
        &[],
        "#include <stdio.h>\nint main(void) { puts(\"dynamic\"); return 0; }\n",
    );
    let output = place.run(&dynamic, &["--sysroot", "/usr/aarch64-linux-gnu"], &[]);
    assert_code(&output, 0);
    assert_eq!(stdout(&output), "dynamic\n");
    let empty = place.scratch.path().join("empty");
    std::fs::create_dir(&empty).unwrap();
    let (output, report) = place.report(&dynamic, &["--sysroot", empty.to_str().unwrap()]);
    assert_code(&output, 127);
    assert_eq!(report["outcome"], "refused");
    assert!(
        stderr(&output).contains("the dynamic loader /lib/ld-linux-aarch64.so.1"),
        "{}",
        message(&output)
    );
    let (output, report) = place.report(&dynamic, &[]);
    assert_code(&output, 69);
    assert_eq!(report["outcome"], "not-started");
    assert!(stderr(&output).contains("no image for aarch64 is in the cache"), "{}", message(&output));
    assert!(place.runs().is_empty(), "a machine was started");
}
