//! The secrets of a run: the passwords on its broker and its ssh keys. They are valid only during the run, and they are
//! removed from every file that the run leaves.

/// The text that replaces a secret.
const HIDDEN: &[u8] = b"[secret]";

/// A line of a private key that is shorter than this could be a word of a log.
const SHORTEST: usize = 16;

/// The secrets that are known so far.
#[derive(Debug, Default)]
pub(super) struct Secrets(Vec<Vec<u8>>);

impl Secrets {
    /// Adds secrets. Each line of a key counts as a secret, because a log may show the lines of a file one by one.
    pub(super) fn add<'a>(&mut self, secrets: impl IntoIterator<Item = &'a str>) {
        let lines = secrets.into_iter().flat_map(str::lines).map(str::trim);
        let lines = lines.filter(|line| line.len() >= SHORTEST && !line.starts_with("-----"));
        self.0.extend(lines.map(|line| line.as_bytes().to_vec()));
    }

    /// Returns the content without the secrets.
    pub(super) fn hide(&self, content: Vec<u8>) -> Vec<u8> {
        self.0.iter().fold(content, |content, secret| replaced(content, secret))
    }
}

fn replaced(content: Vec<u8>, secret: &[u8]) -> Vec<u8> {
    let finder = memchr::memmem::Finder::new(secret);
    let found: Vec<_> = finder.find_iter(&content).collect();
    if found.is_empty() {
        return content;
    }
    let (mut hidden, mut rest) = (Vec::with_capacity(content.len()), 0);
    for at in found {
        hidden.extend_from_slice(&content[rest..at]);
        hidden.extend_from_slice(HIDDEN);
        rest = at + secret.len();
    }
    hidden.extend_from_slice(&content[rest..]);
    hidden
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_secret_is_hidden_wherever_it_is() {
        let mut secrets = Secrets::default();
        let key = "-----BEGIN OPENSSH PRIVATE KEY-----\nb3BlbnNzaC1rZXktdjEAAAAABG5vbmU\nAAAA\n-----END OPENSSH PRIVATE KEY-----\n";
        secrets.add([key, "0123456789abcdef0123"]);
        let log = format!("user 0123456789abcdef0123, again 0123456789abcdef0123\n{key}");
        let hidden = String::from_utf8(secrets.hide(log.into_bytes())).unwrap();
        assert_eq!(
            hidden,
            "user [secret], again [secret]\n-----BEGIN OPENSSH PRIVATE KEY-----\n[secret]\nAAAA\n-----END OPENSSH PRIVATE KEY-----\n"
        );
        assert_eq!(Secrets::default().hide(b"\xff".to_vec()), b"\xff");
    }
}
