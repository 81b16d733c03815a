//! The logins to the bus, by `[credentials] type`. Others must not be able to read secret files ([`check_mode`]). They
//! are read again at each connection, so that they can be changed while the agent runs.

use std::os::unix::fs::{MetadataExt as _, PermissionsExt as _};
use std::path::{Path, PathBuf};
use std::time::SystemTime;

use anyhow::{Context, Result, anyhow, ensure};
use async_nats::ConnectOptions;
use serde::Deserialize;

/// A login, and the place of its secret.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(tag = "type", rename_all = "kebab-case", deny_unknown_fields)]
pub(crate) enum Credentials {
    /// The password is in the configuration file itself.
    TomlShared {
        username: String,
        password: Password,
    },
    UserPassword {
        username: String,
        password_file: PathBuf,
    },
    Token {
        token_file: PathBuf,
    },
    /// The file contains an NKey's seed (`SU…`).
    Nkey {
        seed_file: PathBuf,
    },
    /// The file is a `.creds` file with a user's JWT and NKey, as `nsc` writes it.
    Creds {
        file: PathBuf,
    },
}

/// A password. `Debug` does not print it, since configurations are logged.
#[derive(Clone, PartialEq, Eq, Deserialize)]
pub(crate) struct Password(String);

impl std::fmt::Debug for Password {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("…")
    }
}

impl Credentials {
    /// Returns the file with the secret. `config` is the configuration file.
    fn file<'a>(&'a self, config: &'a Path) -> &'a Path {
        match self {
            Self::TomlShared { .. } => config,
            Self::UserPassword { password_file, .. } => password_file,
            Self::Token { token_file } => token_file,
            Self::Nkey { seed_file } => seed_file,
            Self::Creds { file } => file,
        }
    }

    /// Returns the path of the file with the secret, unless the secret is in the configuration file.
    pub(crate) fn secret_file_mut(&mut self) -> Option<&mut PathBuf> {
        match self {
            Self::TomlShared { .. } => None,
            Self::UserPassword { password_file: file, .. }
            | Self::Token { token_file: file }
            | Self::Nkey { seed_file: file }
            | Self::Creds { file } => Some(file),
        }
    }

    /// Returns the version of the file with the secret ([`modified`]).
    pub(crate) fn modified(&self) -> Option<(SystemTime, u64)> {
        modified(self.file(Path::new("")))
    }

    /// Checks that the secret can be used and that others cannot read it ([`check_mode`]).
    ///
    /// # Errors
    /// Returns an error that names the file and never shows its content.
    pub(crate) fn check(&self, config: &Path) -> Result<()> {
        check_mode(self.file(config))?;
        self.login().map(drop)
    }

    pub(crate) fn login(&self) -> Result<ConnectOptions> {
        Ok(match self {
            Self::TomlShared { username, password } => {
                ConnectOptions::with_user_and_password(username.clone(), password.0.clone())
            }
            Self::UserPassword { username, password_file } => {
                ConnectOptions::with_user_and_password(username.clone(), secret(password_file)?)
            }
            Self::Token { token_file } => ConnectOptions::with_token(secret(token_file)?),
            Self::Nkey { seed_file } => {
                let seed = secret(seed_file)?;
                // async-nats would report a bad seed only at the login, as a refusal by the broker.
                ensure!(
                    seed.starts_with("SU") && seed.len() == 58,
                    "{} contains no user's NKey seed, which has 58 characters and begins with SU",
                    seed_file.display()
                );
                ConnectOptions::with_nkey(seed)
            }
            Self::Creds { file } => {
                // async-nats finds the parts by the lines around them and needs the end of the last line.
                let text = secret(file)? + "\n";
                ConnectOptions::with_credentials(&text).map_err(|_secret_is_in_it| {
                    anyhow!("{} is not a .creds file: it has no JWT or no NKey", file.display())
                })?
            }
        })
    }
}

/// Returns the time of the last change of a file and its inode number; `None` if there is no such file. A file can be
/// replaced by an older one, so the time alone does not show each change.
pub(crate) fn modified(path: &Path) -> Option<(SystemTime, u64)> {
    let file = path.metadata().ok()?;
    Some((file.modified().ok()?, file.ino()))
}

/// Reads a file with a secret, which others must not be able to read ([`check_mode`]).
pub(crate) fn secret(path: &Path) -> Result<String> {
    check_mode(path)?;
    let text =
        std::fs::read_to_string(path).with_context(|| format!("read the secret {}", path.display()))?;
    let text = text.trim();
    ensure!(!text.is_empty(), "the secret {} is empty", path.display());
    Ok(text.to_owned())
}

/// Checks that nobody else can read a secret. Only its owner may read it. If root owns it, the agent's own group may
/// read it too: so the installer passes files to the agent, which cannot change them. A credential that systemd passes
/// in is in a protected directory. Its mode may show group permissions, which then stand for an access control list
/// (systemd.exec(5), LoadCredential=), so they are accepted.
pub(crate) fn check_mode(path: &Path) -> Result<()> {
    let from_systemd = std::env::var_os("CREDENTIALS_DIRECTORY").is_some_and(|own| path.starts_with(own));
    let metadata =
        path.metadata().with_context(|| format!("read the mode of the secret {}", path.display()))?;
    let mode = metadata.permissions().mode() & 0o777;
    let own_group = rustix::process::getegid().as_raw();
    let of_group = metadata.uid() == 0 && metadata.gid() == own_group && own_group != 0 && mode & 0o030 == 0;
    ensure!(
        mode & 0o077 == 0 || (from_systemd || of_group) && mode & 0o007 == 0,
        "{} contains a secret, and others can read it: its owner is {}, its group {}, its mode {mode:04o}. Give it mode \
         0600, or give it to root with the agent's group and mode 0640",
        path.display(),
        metadata.uid(),
        metadata.gid()
    );
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn file(directory: &Path, text: &str, mode: u32) -> PathBuf {
        let path = directory.join(format!("secret-{mode:o}-{}", text.len()));
        std::fs::write(&path, text).unwrap();
        std::fs::set_permissions(&path, std::fs::Permissions::from_mode(mode)).unwrap();
        path
    }

    fn parse(text: &str) -> Result<Credentials> {
        Ok(toml::from_str(text)?)
    }

    #[test]
    fn each_type_is_parsed_and_its_secret_is_read() {
        let directory = tempfile::tempdir().unwrap();
        let own = |text: &str| file(directory.path(), text, 0o600).display().to_string();
        let config = file(directory.path(), "x", 0o600);
        for text in [
            "type = 'toml-shared'\nusername = 'u'\npassword = 'p'".to_owned(),
            format!("type = 'user-password'\nusername = 'u'\npassword_file = '{}'", own("p\n")),
            format!("type = 'token'\ntoken_file = '{}'", own("tok")),
            format!("type = 'nkey'\nseed_file = '{}'", own(&nkeys::KeyPair::new_user().seed().unwrap())),
        ] {
            parse(&text).unwrap().check(&config).unwrap_or_else(|error| panic!("{text}: {error:#}"));
        }
    }

    #[test]
    fn a_secret_that_others_can_read_is_refused_and_never_shown() {
        let directory = tempfile::tempdir().unwrap();
        let config = file(directory.path(), "x", 0o644);
        let shared = parse("type = 'toml-shared'\nusername = 'u'\npassword = 'p'").unwrap();
        assert!(shared.check(&config).unwrap_err().to_string().contains("0644"));
        let table = [
            (0o640, "s3cret", "mode 0640"),
            (0o604, "s3cret", "mode 0604"),
            (0o600, " \n", "is empty"),
            (0o600, "s3cret", "no user's NKey seed"),
        ];
        for (mode, text, expected) in table {
            let path = file(directory.path(), text, mode);
            let nkey = parse(&format!("type = 'nkey'\nseed_file = '{}'", path.display())).unwrap();
            let error = format!("{:#}", nkey.check(&config).unwrap_err());
            assert!(error.contains(expected) && !error.contains("s3cret"), "{error}");
        }
        let path = file(directory.path(), "s3cret-in-no-form", 0o600);
        let creds = parse(&format!("type = 'creds'\nfile = '{}'", path.display())).unwrap();
        let error = format!("{:#}", creds.check(&config).unwrap_err());
        assert!(error.contains("not a .creds file") && !error.contains("s3cret"), "{error}");
        let absent = parse("type = 'token'\ntoken_file = '/nonexistent'").unwrap();
        assert!(format!("{:#}", absent.check(&config).unwrap_err()).contains("/nonexistent"));
    }
}
