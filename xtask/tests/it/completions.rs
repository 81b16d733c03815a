//! Checks the candidates that a real bash offers at a press of Tab, with the script of `cargo xtask completions bash`.

use std::fs::Permissions;
use std::os::unix::fs::PermissionsExt as _;
use std::path::Path;
use std::process::Command;

use tempfile::TempDir;

const COMPLETER: &str = env!("CARGO_BIN_EXE_xtask-complete");

/// Makes a cache with one instance.
fn cache() -> TempDir {
    let cache = tempfile::Builder::new().permissions(Permissions::from_mode(0o700)).tempdir().unwrap();
    let run = cache.path().join("runs/1124-120000-abcd");
    std::fs::create_dir_all(&run).unwrap();
    let machine = r#"{"schema":1,"id":"1124-120000-abcd","name":"dev","arch":"aarch64","image":"debian-12",
        "made_at":"2026-11-24T12:00:00Z","login_user":"u","ssh_port":null,"console":"/c"}"#;
    std::fs::write(run.join("kept"), machine).unwrap();
    cache
}

/// Runs `before` and sources the script. Returns the sorted candidates for the last word of `line` in `directory`.
fn offered(cache: &Path, directory: &Path, before: &str, line: &[&str]) -> Vec<String> {
    let source = format!(r#"source <("{COMPLETER}" bash) && source <("{COMPLETER}" bash) || exit 1"#);
    pressed(cache, directory, &format!("{before}\n{source}"), line)
}

/// Runs `set_up`, which sources the script. Returns the sorted candidates for the last word of `line` in `directory`.
fn pressed(cache: &Path, directory: &Path, set_up: &str, line: &[&str]) -> Vec<String> {
    let script = format!(
        r#"{set_up}
           cd "$0" || exit 1
           COMP_WORDS=("$@") COMP_CWORD=$(($# - 1)) COMPREPLY=()
           [[ $(complete -p cargo) =~ -F\ ([^ ]+) ]] || exit 1
           "${{BASH_REMATCH[1]}}" cargo "${{@: -1}}" "${{@: -2:1}}" 2>/dev/null
           printf '%s\n' "${{COMPREPLY[@]}}""#
    );
    let output = Command::new("bash")
        .args(["--norc", "--noprofile", "-c", &script])
        .arg(directory)
        .args(line)
        .env("IOT_XTASK_CACHE", cache)
        .current_dir(env!("CARGO_MANIFEST_DIR"))
        .output()
        .unwrap();
    assert!(output.status.success(), "{output:?}");
    let message = String::from_utf8(output.stdout).unwrap();
    let mut words: Vec<_> = message.lines().filter(|word| !word.is_empty()).map(str::to_owned).collect();
    words.sort();
    words
}

#[test]
fn flags_values_and_names_are_offered() {
    let (cache, here) = (cache(), Path::new(env!("CARGO_MANIFEST_DIR")));
    let offered = |line: &[&str]| offered(cache.path(), here, "", line);
    assert_eq!(offered(&["cargo", "xtask", "smo"]), ["smoke"]);
    assert_eq!(offered(&["cargo", "xtask", "smoke", "--until", "j"]), ["join"]);
    assert_eq!(offered(&["cargo", "xtask", "smoke", "--until", "=", "j"]), ["join"], "as bash splits it");
    assert!(offered(&["cargo", "xtask", "smoke", "--until", "="]).contains(&"join".to_owned()));
    assert_eq!(offered(&["cargo", "xtask", "vm", "ssh", "d"]), ["dev"]);
    assert_eq!(offered(&["cargo", "xtask", "vm", "exec", "-m", "d"]), ["dev"]);
    assert_eq!(offered(&["cargo", "xtask", "vm", "ssh", "x"]), [""; 0], "no machine's name begins with x");
    let images = ["debian-13", "debian-13-16k"];
    assert_eq!(offered(&["cargo", "xtask", "image", "build", "debian-13"]), images);
    assert_eq!(offered(&["cargo", "xtask", "inspect", "--device", "pi5"]), ["pi5"]);
    assert_eq!(offered(&["cargo", "build"]), [""; 0], "cargo completes it itself");
}

#[test]
fn a_workspace_is_the_same_by_way_of_a_link() {
    let cache = cache();
    let link = cache.path().join("link");
    std::os::unix::fs::symlink(env!("CARGO_MANIFEST_DIR"), &link).unwrap();
    assert_eq!(offered(cache.path(), &link, "", &["cargo", "xtask", "smo"]), ["smoke"]);
}

#[test]
fn what_is_cargos_own_and_other_workspaces_are_left_to_what_was_there_before() {
    let (cache, here) = (cache(), Path::new(env!("CARGO_MANIFEST_DIR")));
    let before = "_theirs() { COMPREPLY=(theirs); }; complete -F _theirs cargo";
    let offered = |directory, line| offered(cache.path(), directory, before, line);
    assert_eq!(offered(here, &["cargo", "bui"]), ["theirs"]);
    assert_eq!(offered(cache.path(), &["cargo", "xtask", "smo"]), ["theirs"]);
    assert_eq!(offered(here, &["cargo", "xtask", "smo"]), ["smoke"]);
}

#[test]
fn a_completer_that_is_gone_leaves_the_line_to_what_was_there_before() {
    let (cache, here) = (cache(), Path::new(env!("CARGO_MANIFEST_DIR")));
    let copy = cache.path().join("completer");
    let source = format!(
        r#"_theirs() {{ COMPREPLY=(theirs); }}; complete -F _theirs cargo
           cp {COMPLETER} {copy} && source <({copy} bash) || exit 1"#,
        copy = copy.display()
    );
    let line = ["cargo", "xtask", "smo"];
    assert_eq!(pressed(cache.path(), here, &source, &line), ["smoke"]);
    let gone = format!("{source}\nrm {}", copy.display());
    assert_eq!(pressed(cache.path(), here, &gone, &line), ["theirs"]);
}

#[test]
fn a_reader_that_has_had_enough_is_no_error() {
    let (reader, writer) = std::io::pipe().unwrap();
    drop(reader);
    let mut command = Command::new(COMPLETER);
    command.arg("bash").current_dir(env!("CARGO_MANIFEST_DIR")).stdout(writer);
    let output = command.output().unwrap();
    assert!(output.status.success() && output.stderr.is_empty(), "{output:?}");
}
