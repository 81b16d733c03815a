//! The distribution of a system, as os-release(5) names it.

use serde::{Deserialize, Serialize};

/// The contents of an os-release file.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct OsRelease {
    /// The value of `PRETTY_NAME`.
    pub name: String,
    /// The value of `ID`.
    pub id: String,
    /// The value of `VERSION_ID`, which is empty for a rolling distribution.
    pub version_id: String,
}

impl OsRelease {
    /// Parses the text of an os-release file. If `ID` or `VERSION_ID` is missing, the field is empty.
    pub fn parse(text: &str) -> Self {
        let of = |name: &str| {
            let line = text.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix('='));
            line.map(|value| value.trim_matches(['"', '\'']).to_owned()).unwrap_or_default()
        };
        let name = of("PRETTY_NAME");
        let name = if name.is_empty() { "an unknown system".to_owned() } else { name };
        Self { name, id: of("ID"), version_id: of("VERSION_ID") }
    }
}

/// The os-release(5) values of a guest, for reports.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct OsReleaseReport {
    pub id: String,
    pub version_id: String,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn os_release_is_read_with_and_without_quotes() {
        let os = OsRelease::parse(
            "PRETTY_NAME=\"Debian GNU/Linux 12 (bookworm)\"\nID=debian\nVERSION_ID=\"12\"\n",
        );
        assert_eq!((os.id.as_str(), os.version_id.as_str()), ("debian", "12"));
        assert_eq!(os.name, "Debian GNU/Linux 12 (bookworm)");
        assert_eq!(OsRelease::parse("ID='arch'\n").id, "arch");
        assert_eq!(OsRelease::parse("ID=arch\n").version_id, "");
        assert_eq!(OsRelease::parse("").name, "an unknown system");
    }
}
