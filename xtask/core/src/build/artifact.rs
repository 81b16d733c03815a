//! Finds the path of an executable that cargo has built. The path is read from cargo's JSON messages, because the
//! directory depends on cargo's configuration.

use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};
use cargo_metadata::Message;
use cargo_metadata::diagnostic::{Diagnostic, DiagnosticLevel};

/// Returns the path of the executable `name` from the JSON messages of one `cargo build`.
///
/// # Errors
/// Returns an error if the messages cannot be read, or if they do not name exactly one such executable.
pub fn executable(messages: &str, name: &str) -> Result<PathBuf> {
    let mut found = Vec::new();
    for message in Message::parse_stream(messages.as_bytes()) {
        if let Message::CompilerArtifact(artifact) = message.context("read cargo's JSON messages")?
            && artifact.target.name == name
            && let Some(executable) = artifact.executable
        {
            found.push(executable.into_std_path_buf());
        }
    }
    match <[PathBuf; 1]>::try_from(found) {
        Ok([one]) => Ok(one),
        Err(found) if found.is_empty() => {
            bail!("find the executable {name}: cargo's messages do not name it")
        }
        Err(found) => bail!("find the executable {name}: cargo's messages name more than one: {found:?}"),
    }
}

/// Returns the compiler's diagnostic if this line of cargo's JSON messages contains one.
pub(super) fn diagnostic(line: &str) -> Option<Diagnostic> {
    match serde_json::from_str(line).ok()? {
        Message::CompilerMessage(message) => Some(message.message),
        _ => None,
    }
}

/// Returns whether a diagnostic is an error in source code. Other errors, such as those of a linker or of a full disk,
/// name no place in the source code.
pub(super) fn rejects_source(diagnostic: &Diagnostic) -> bool {
    diagnostic.level == DiagnosticLevel::Error && !diagnostic.spans.is_empty()
}

/// Returns whether an executable was compiled from the sources of the workspace at `root`. Cargo writes a list of the
/// sources beside the executable. If the paths in this list are relative (cargo's `build.dep-info-basedir`), the
/// workspace is unknown, and the function returns true.
///
/// # Errors
/// Returns an error if the list cannot be read.
pub fn is_built_in(executable: &Path, root: &Path) -> Result<bool> {
    let list = fs_err::read_to_string(executable.with_extension("d"))?;
    let escaped = |path: &Path| path.display().to_string().replace(' ', "\\ ");
    let main = "/agent/src/main.rs";
    let is_relative = !list.split_whitespace().any(|path| path.starts_with('/') && path.ends_with(main));
    Ok(is_relative || list.contains(&format!(" {}{main}", escaped(root))))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_sources_of_an_executable_are_in_the_list_beside_it() {
        let directory = tempfile::tempdir().unwrap();
        let executable = directory.path().join("iot-agent");
        let built_in = |list: &str, root: &str| {
            std::fs::write(directory.path().join("iot-agent.d"), list).unwrap();
            is_built_in(&executable, Path::new(root)).unwrap()
        };
        let list = "/a/target/iot-agent: /a/agent/src/lib.rs /a/agent/src/main.rs\n";
        assert!(built_in(list, "/a"));
        assert!(!built_in(list, "/b"), "it is another checkout's");
        assert!(built_in("/t/iot-agent: /a\\ b/agent/src/main.rs\n", "/a b"));
        assert!(built_in("iot-agent: agent/src/main.rs\n", "/b"), "relative paths say nothing");
        std::fs::remove_file(directory.path().join("iot-agent.d")).unwrap();
        assert!(is_built_in(&executable, Path::new("/a")).is_err());
    }

    fn message(name: &str, executable: &str) -> String {
        format!(
            r#"{{"reason":"compiler-artifact","package_id":"path+file:///w#{name}@0.1.0","manifest_path":"/w/Cargo.toml",
            "target":{{"kind":["bin"],"crate_types":["bin"],"name":"{name}","src_path":"/w/main.rs","edition":"2024",
            "doc":true,"doctest":false,"test":true}},"profile":{{"opt_level":"s","debuginfo":0,"debug_assertions":false,
            "overflow_checks":false,"test":false}},"features":[],"filenames":["/t/{name}"],"executable":{executable},
            "fresh":true}}"#
        )
        .replace('\n', "")
    }

    #[test]
    fn exactly_one_or_a_readable_failure() {
        let agent = message("iot-agent", "\"/t/iot-agent\"");
        let library = message("iot-agent", "null");
        let other = message("other", "\"/t/other\"");
        let stream = [library.as_str(), &other, &agent].join("\n");
        assert_eq!(executable(&stream, "iot-agent").unwrap(), PathBuf::from("/t/iot-agent"));
        let none = executable(&[library.as_str(), &other].join("\n"), "iot-agent").unwrap_err();
        assert!(none.to_string().contains("do not name it"), "{none}");
        let two = executable(&[agent.as_str(), &agent].join("\n"), "iot-agent").unwrap_err();
        assert!(two.to_string().contains("more than one"), "{two}");
    }
}
