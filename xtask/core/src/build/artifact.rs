//! The path of an executable that cargo has built, taken from cargo's JSON messages and not guessed as
//! `target/<triple>/release`.

use std::path::PathBuf;

use anyhow::{Context, Result, bail};
use cargo_metadata::Message;

/// Returns the only executable of the binary `name` in the messages of one `cargo build --message-format json…`.
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

#[cfg(test)]
mod tests {
    use super::*;

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
