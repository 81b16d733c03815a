//! The address of a download. Not every URL is allowed, and a URL may contain a password or a token, which is never
//! shown.

use reqwest::Url;
use xtask_core::error::Failure;
use xtask_core::image::shown;

/// An address that a download may request.
#[derive(Debug, Clone)]
pub(super) struct Address(Url);

impl Address {
    /// Parses a URL. Plain http is allowed only if a digest will prove the content.
    pub(super) fn parse(text: &str, has_digest: bool) -> Result<Self, Failure> {
        let url = Url::parse(text).map_err(|error| {
            // The text may be anything, even a password, so it is not shown.
            Failure::usage(format!("cannot parse the URL: {error}; write https://host/path"))
        })?;
        // `user:password@host` without a scheme can be parsed as a URL too.
        let shown = if url.has_host() { shown(text) } else { format!("{}:…", url.scheme()) };
        match url.scheme() {
            "https" => Ok(Self(url)),
            "http" if has_digest => Ok(Self(url)),
            "http" => Err(Failure::usage(format!(
                "{shown}: over plain http anybody on the way could change the file: give its digest, or an https URL"
            ))),
            other => Err(Failure::usage(format!(
                "{shown}: {other} is not supported: write an https URL, or http with a digest"
            ))),
        }
    }

    pub(super) fn url(&self) -> Url {
        self.0.clone()
    }

    /// Returns the URL without its credentials. Partial files are identified by it.
    pub(super) fn identity(&self) -> String {
        let mut url = self.url();
        // This fails on a URL without a host, which has no credentials either.
        let _no_host = url.set_username("").and_then(|()| url.set_password(None));
        url.to_string()
    }
}

impl std::fmt::Display for Address {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(&shown(self.0.as_str()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_cannot_be_proven_is_not_asked_for() {
        let table = [
            ("https://host/file", false, None),
            ("http://host/file", true, None),
            ("http://host/file", false, Some("give its digest")),
            ("file:///etc/passwd", true, Some("file is not supported")),
            ("ftp://host/file", true, Some("ftp is not supported")),
            ("host/file", true, Some("cannot parse")),
        ];
        for (text, has_digest, refused) in table {
            let error = Address::parse(text, has_digest).err().map(|error| error.to_string());
            assert_eq!(error.is_some(), refused.is_some(), "{text}: {error:?}");
            assert!(error.unwrap_or_default().contains(refused.unwrap_or_default()), "{text}");
        }
    }

    #[test]
    fn credentials_are_shown_to_nobody() {
        let address = Address::parse("https://user:secret@host:8443/a%20b?token=secret#x", true).unwrap();
        assert_eq!(address.to_string(), "https://host:8443/a%20b?…");
        assert_eq!(address.identity(), "https://host:8443/a%20b?token=secret#x");
        let table =
            ["ftp://user:secret@host/", "http://user:secret@host/", "user:secret@host", "https://u:secret@"];
        for text in table {
            let error = Address::parse(text, false).unwrap_err().to_string();
            assert!(!error.contains("secret"), "{error}");
        }
    }
}
