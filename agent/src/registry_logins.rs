//! The logins to registries, in a file in the form of containers-auth.json(5). The file is read again for each pull, so
//! that it can be replaced while the agent runs.

use std::collections::BTreeMap;
use std::path::Path;

use anyhow::{Context, Result, anyhow, ensure};
use data_encoding::{BASE64, BASE64URL};
use serde::Deserialize;
use serde_json::json;

use crate::credentials::secret;

/// The parts of the file that the agent reads. They are secret, so `Debug` is not derived.
#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
pub(crate) struct RegistryLogins {
    /// The logins by registry (`registry.example:5000`) or namespace (`registry.example/team/web`).
    #[serde(default)]
    auths: BTreeMap<String, Entry>,
    #[serde(default)]
    cred_helpers: BTreeMap<String, String>,
    creds_store: Option<String>,
}

#[derive(Deserialize)]
struct Entry {
    /// User and password, joined by a colon, in Base64. If the entry has none, the namespace needs no login.
    #[serde(default)]
    auth: String,
    #[serde(default)]
    identitytoken: String,
}

impl RegistryLogins {
    /// Reads and checks the file. Others must not be able to read it ([`crate::credentials::check_mode`]).
    ///
    /// # Errors
    /// Returns an error that names the file and the registry, and never shows a login.
    pub(crate) fn read(path: &Path) -> Result<Self> {
        let logins = Self::parse(&secret(path)?);
        logins.with_context(|| format!("read the logins to registries in {}", path.display()))
    }

    fn parse(text: &str) -> Result<Self> {
        // serde's error could contain a login.
        let logins: Self = serde_json::from_str(text).map_err(|error| {
            anyhow!("line {} does not have the form of containers-auth.json(5)", error.line())
        })?;
        ensure!(
            logins.cred_helpers.is_empty() && logins.creds_store.is_none(),
            "the agent runs no credential helpers: replace credHelpers and credsStore by logins in auths"
        );
        for (registry, entry) in &logins.auths {
            ensure!(
                !registry.contains("://"),
                "auths contains the URL {registry:?}: write the registry's host, for example docker.io"
            );
            entry
                .user_and_password()
                .with_context(|| format!("auths.{registry:?}: auth is not USER:PASSWORD in Base64"))?;
        }
        Ok(logins)
    }

    /// Returns the value of the header `X-Registry-Auth` for an image: its login, in JSON and Base64 for URLs. The
    /// login with the longest namespace that contains the image counts.
    pub(crate) fn header(&self, reference: &str) -> Option<String> {
        let mut namespace = repository(reference);
        let entry = loop {
            match (self.auths.get(namespace), namespace.rsplit_once('/')) {
                (Some(entry), _) => break entry,
                (None, Some((above, _))) => namespace = above,
                (None, None) => return None,
            }
        };
        let (username, password) = entry.user_and_password().ok().flatten()?;
        let mut login = json!({ "username": username, "password": password });
        if !entry.identitytoken.is_empty() {
            login["identitytoken"] = entry.identitytoken.clone().into();
        }
        Some(BASE64URL.encode(login.to_string().as_bytes()))
    }
}

impl Entry {
    fn user_and_password(&self) -> Result<Option<(String, String)>> {
        if self.auth.is_empty() {
            return Ok(None);
        }
        // The errors of these functions could contain a part of the login.
        let decoded =
            BASE64.decode(self.auth.as_bytes()).ok().and_then(|bytes| String::from_utf8(bytes).ok());
        let text = decoded.context("it cannot be decoded")?;
        let (user, password) = text.split_once(':').context("it contains no colon")?;
        Ok(Some((user.to_owned(), password.to_owned())))
    }
}

/// Returns the reference without its tag and its digest.
fn repository(reference: &str) -> &str {
    let name = reference.split_once('@').map_or(reference, |(name, _)| name);
    match name.rsplit_once(':') {
        // The colon of a port is before a slash.
        Some((repository, tag)) if !tag.contains('/') => repository,
        _ => name,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::Value;

    fn entry(login: &str) -> String {
        format!(r#"{{"auth":"{}"}}"#, BASE64.encode(login.as_bytes()))
    }

    #[test]
    fn only_the_login_of_the_longest_namespace_is_sent() {
        let [host, team, web] = ["a:host", "b:te:am", "c:web"].map(entry);
        let text = format!(
            r#"{{"auths":{{"r.example":{host},"r.example/team":{team},"r.example/team/web":{web},
                "r.example/open":{{}},"r.example:5000":{{"auth":"ZDp4","identitytoken":"t0ken"}}}}}}"#
        );
        let logins = RegistryLogins::parse(&text).unwrap();
        let sent = |reference: &str| {
            let header = logins.header(reference)?;
            Some(serde_json::from_slice::<Value>(&BASE64URL.decode(header.as_bytes()).unwrap()).unwrap())
        };
        let login =
            |username: &str, password: &str| Some(json!({"username": username, "password": password}));
        let table = [
            ("r.example/other:1", login("a", "host")),
            ("r.example/team/api:1", login("b", "te:am")),
            ("r.example/team/web:1", login("c", "web")),
            ("r.example/team/web@sha256:00", login("c", "web")),
            ("r.example/team/web-2:1", login("b", "te:am")),
            ("r.example/teams:1", login("a", "host")),
            ("r.example/open/a:1", None),
            ("r.example:5001/team/web:1", None),
            ("r.example.org/team/web:1", None),
            ("localhost/team/web:1", None),
        ];
        for (reference, expected) in table {
            assert_eq!(sent(reference), expected, "{reference}");
        }
        assert_eq!(sent("r.example:5000/a").unwrap()["identitytoken"], "t0ken");
        assert_eq!(sent("r.example:5000/a:1").unwrap()["password"], "x");
    }

    #[test]
    fn errors_name_the_registry_and_show_no_login() {
        let secret = BASE64.encode(b"no-colon-s3cret");
        let table = [
            ("s3cret", "line 1 does not have the form"),
            (r#"{"auths":{"r.example":"s3cret"}}"#, "line 1 does not have the form"),
            (
                r#"{"auths":{"r.example":{"auth":"s3cret!"}}}"#,
                "auths.\"r.example\": auth is not USER:PASSWORD",
            ),
            (&format!(r#"{{"auths":{{"r.example":{{"auth":"{secret}"}}}}}}"#), "it contains no colon"),
            (r#"{"auths":{"https://index.docker.io/v1/":{}}}"#, "write the registry's host"),
            (r#"{"auths":{},"credsStore":"pass"}"#, "runs no credential helpers"),
            (r#"{"credHelpers":{"r.example":"pass"}}"#, "runs no credential helpers"),
        ];
        for (text, expected) in table {
            let error = format!("{:#}", RegistryLogins::parse(text).err().unwrap());
            assert!(error.contains(expected), "{error:?} does not contain {expected:?}");
            assert!(!error.contains("s3cret") && !error.contains(&secret), "{error}");
        }
        assert!(RegistryLogins::parse("{}").unwrap().header("r.example/a:1").is_none());
    }
}
