//! The secrets of a run: the passwords on its broker, its ssh keys, and the passwords of this host's proxies. They are
//! hidden in the reports and logs of the run.

/// The beginning of the text that replaces a secret. The text is as long as the secret, because a report has offsets
/// into a log.
const HIDDEN: &[u8] = b"[secret]";

/// The character that fills the rest of the text.
const FILLER: u8 = b'*';

/// The secrets that are known so far.
#[derive(Debug, Default)]
pub(super) struct Secrets(Vec<Vec<u8>>);

impl Secrets {
    /// Adds secrets. Each line of a key counts as a secret, because a log may show the lines of a file one by one. A
    /// line that is shorter than the text that would replace it is no secret, because it could be a word of a log.
    pub(super) fn add<'a>(&mut self, secrets: impl IntoIterator<Item = &'a str>) {
        let lines = secrets.into_iter().flat_map(str::lines).map(str::trim);
        let lines = lines.filter(|line| line.len() >= HIDDEN.len() && !line.starts_with("-----"));
        self.0.extend(lines.map(|line| line.as_bytes().to_vec()));
    }

    /// Returns the content with a text of the same length in place of each secret.
    pub(super) fn hide(&self, mut content: Vec<u8>) -> Vec<u8> {
        for secret in &self.0 {
            let found: Vec<_> = memchr::memmem::find_iter(&content, secret).collect();
            for at in found {
                let place = &mut content[at..at + secret.len()];
                place.fill(FILLER);
                place[..HIDDEN.len()].copy_from_slice(HIDDEN);
            }
        }
        content
    }

    /// Returns a text like [`Self::hide`].
    pub(super) fn hide_in(&self, text: &str) -> String {
        String::from_utf8_lossy(&self.hide(text.as_bytes().to_vec())).into_owned()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_secret_is_hidden_wherever_it_is() {
        let mut secrets = Secrets::default();
        let key = "-----BEGIN OPENSSH PRIVATE KEY-----\nb3BlbnNzaC1rZXktdjEAAAAA\nAAAA\n-----END OPENSSH PRIVATE KEY-----\n";
        secrets.add([key, "0123456789abcdef"]);
        let log = format!("user 0123456789abcdef, again 0123456789abcdef\n{key}");
        let hidden = secrets.hide_in(&log);
        assert_eq!(
            hidden,
            "user [secret]********, again [secret]********\n-----BEGIN OPENSSH PRIVATE KEY-----\n\
             [secret]****************\nAAAA\n-----END OPENSSH PRIVATE KEY-----\n"
        );
        assert_eq!(hidden.len(), log.len());
        assert_eq!(Secrets::default().hide(b"\xff".to_vec()), b"\xff");
    }
}
