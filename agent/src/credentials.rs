//! How the agent logs in to the bus, by `[credentials] type`. Secrets are in files that only their owner may read, and are
//! read again at each connection, so that they can be changed under a running agent; but for one that stands in the configuration
//! itself.

use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, anyhow, bail, ensure};
use async_nats::ConnectOptions;
use serde::Deserialize;

/// The types that this agent knows, for the refusal of any other.
const KNOWN: [&str; 5] = ["toml-shared", "user-password", "token", "nkey", "creds"];

/// A login, and where its secret is.
#[derive(Clone, PartialEq, Eq)]
pub enum Credentials {
    /// User and password stand in the configuration file itself.
    TomlShared {
        /// The bus user.
        username: String,
        /// Its password.
        password: String,
    },
    /// A user, and a file that holds the password.
    UserPassword {
        /// The bus user.
        username: String,
        /// Its password's file.
        password_file: PathBuf,
    },
    /// A file that holds a token.
    Token {
        /// That file.
        token_file: PathBuf,
    },
    /// A file that holds an NKey's seed (`SU…`).
    Nkey {
        /// That file.
        seed_file: PathBuf,
    },
    /// A `.creds` file: a user's JWT and NKey, as `nsc` writes it.
    Creds {
        /// That file.
        file: PathBuf,
    },
}

/// Never prints the password: a configuration ends up in logs.
impl std::fmt::Debug for Credentials {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::TomlShared { username, .. } => write!(f, "TomlShared {{ username: {username:?}, .. }}"),
            Self::UserPassword { username, password_file } => {
                write!(f, "UserPassword {{ username: {username:?}, password_file: {password_file:?} }}")
            }
            Self::Token { token_file } => write!(f, "Token {{ token_file: {token_file:?} }}"),
            Self::Nkey { seed_file } => write!(f, "Nkey {{ seed_file: {seed_file:?} }}"),
            Self::Creds { file } => write!(f, "Creds {{ file: {file:?} }}"),
        }
    }
}

#[derive(Deserialize)]
#[serde(tag = "type", rename_all = "kebab-case", deny_unknown_fields)]
enum Raw {
    TomlShared { username: String, password: String },
    UserPassword { username: String, password_file: PathBuf },
    Token { token_file: PathBuf },
    Nkey { seed_file: PathBuf },
    Creds { file: PathBuf },
}

impl Credentials {
    /// The table `[credentials]`.
    ///
    /// # Errors
    /// For an unknown type, with the known ones; for a key that is missing or unknown.
    pub fn parse(table: toml::Table) -> Result<Self> {
        let kind = table.get("type").and_then(toml::Value::as_str).unwrap_or_default().to_owned();
        if !KNOWN.contains(&kind.as_str()) {
            bail!("[credentials] type = {kind:?} is unknown; known types: {}", KNOWN.join(", "));
        }
        let raw: Raw = table.try_into().map_err(|error: toml::de::Error| {
            anyhow!("[credentials] of type {kind:?}: {}", error.message())
        })?;
        Ok(match raw {
            Raw::TomlShared { username, password } => Self::TomlShared { username, password },
            Raw::UserPassword { username, password_file } => Self::UserPassword { username, password_file },
            Raw::Token { token_file } => Self::Token { token_file },
            Raw::Nkey { seed_file } => Self::Nkey { seed_file },
            Raw::Creds { file } => Self::Creds { file },
        })
    }

    /// Where the secret is; `config` is the configuration's own file.
    fn file<'a>(&'a self, config: &'a Path) -> &'a Path {
        match self {
            Self::TomlShared { .. } => config,
            Self::UserPassword { password_file, .. } => password_file,
            Self::Token { token_file } => token_file,
            Self::Nkey { seed_file } => seed_file,
            Self::Creds { file } => file,
        }
    }

    /// Whether the secret can be used and is nobody else's to read.
    ///
    /// # Errors
    /// Names the file; never shows what is in it.
    pub fn check(&self, config: &Path) -> Result<()> {
        check_mode(self.file(config))?;
        self.login().map(drop)
    }

    /// What to connect with.
    ///
    /// # Errors
    /// As [`Credentials::check`].
    pub fn login(&self) -> Result<ConnectOptions> {
        Ok(match self {
            Self::TomlShared { username, password } => {
                ConnectOptions::with_user_and_password(username.clone(), password.clone())
            }
            Self::UserPassword { username, password_file } => {
                ConnectOptions::with_user_and_password(username.clone(), secret(password_file)?)
            }
            Self::Token { token_file } => ConnectOptions::with_token(secret(token_file)?),
            Self::Nkey { seed_file } => {
                let seed = secret(seed_file)?;
                // async-nats would find a bad seed at the login, and there say that the broker refuses it.
                ensure!(
                    seed.starts_with("SU") && seed.len() == 58,
                    "{} holds no user's NKey seed: 58 characters that begin with SU",
                    seed_file.display()
                );
                ConnectOptions::with_nkey(seed)
            }
            Self::Creds { file } => {
                // async-nats finds its parts by the lines around them, the last one's end included.
                let text = secret(file)? + "\n";
                ConnectOptions::with_credentials(&text).map_err(|_secret_is_in_it| {
                    anyhow!("{} is no .creds file: it has no JWT or no NKey", file.display())
                })?
            }
        })
    }
}

fn secret(path: &Path) -> Result<String> {
    check_mode(path)?;
    let text =
        std::fs::read_to_string(path).with_context(|| format!("read the secret {}", path.display()))?;
    let text = text.trim();
    ensure!(!text.is_empty(), "the secret {} is empty", path.display());
    Ok(text.to_owned())
}

/// Nobody but its owner may read it. What systemd hands over as a credential is behind a directory of its own, and may show
/// a group's rights that stand for an access list (systemd.exec(5), LoadCredential=).
fn check_mode(path: &Path) -> Result<()> {
    let handed_over = std::env::var_os("CREDENTIALS_DIRECTORY").is_some_and(|own| path.starts_with(own));
    let metadata = path.metadata().with_context(|| format!("look at the secret {}", path.display()))?;
    let mode = metadata.permissions().mode() & 0o777;
    ensure!(
        mode & 0o077 == 0 || handed_over && mode & 0o007 == 0,
        "{} holds a secret and has the mode {mode:04o}: chmod 0600 it",
        path.display()
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
        Credentials::parse(text.parse().unwrap())
    }

    #[test]
    fn each_type_is_read_and_its_secret_used() {
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
    fn a_secret_that_others_may_read_is_refused_and_never_shown() {
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
        assert!(error.contains("no .creds file") && !error.contains("s3cret"), "{error}");
        let absent = parse("type = 'token'\ntoken_file = '/nonexistent'").unwrap();
        assert!(format!("{:#}", absent.check(&config).unwrap_err()).contains("/nonexistent"));
    }
}
