//! Reads the links of a publisher's directory listing, and finds the newest of its dated releases.

use std::convert::Infallible;
use std::fmt;

use anyhow::{Context, Result, ensure};
use html5gum::{Token, Tokenizer};
use reqwest::Url;

/// The pattern of the name of a dated directory: `release-{date}`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Pattern {
    before: String,
    after: String,
}

/// A date as publishers write it, `20260705` or `20260712-2537`. Its parts are compared as numbers.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct Date {
    parts: Vec<u64>,
    text: String,
}

impl Pattern {
    /// Parses a pattern.
    ///
    /// # Errors
    /// Returns an error if the text is not one name with one `{date}`.
    pub(super) fn parse(text: &str) -> Result<Self> {
        let parts = text.split_once("{date}").filter(|(_, after)| !after.contains("{date}"));
        let (before, after) = parts.filter(|_| !text.contains('/')).with_context(|| {
            format!("read release = {text:?}: write a directory's name with one {{date}}")
        })?;
        Ok(Self { before: before.to_owned(), after: after.to_owned() })
    }

    /// Returns the date in a directory's name; `None` if the name does not match.
    pub(super) fn date_in(&self, name: &str) -> Option<Date> {
        Date::parse(name.strip_prefix(&self.before)?.strip_suffix(&self.after)?)
    }

    /// Returns the name of the directory of `date`.
    pub(super) fn directory(&self, date: &Date) -> String {
        format!("{}{date}{}", self.before, self.after)
    }
}

impl Date {
    /// Parses a day of eight digits, and the numbers behind it that distinguish several releases of one day.
    fn parse(text: &str) -> Option<Self> {
        let digits = |part: &str| (1..=9).contains(&part.len()) && part.bytes().all(|b| b.is_ascii_digit());
        let parts: Vec<&str> = text.split(['-', '.']).collect();
        if parts[0].len() != 8 || !parts.iter().all(|part| digits(part)) {
            return None;
        }
        let parts: Vec<u64> = parts.iter().map(|part| part.parse().ok()).collect::<Option<_>>()?;
        let (month, day) = (parts[0] / 100 % 100, parts[0] % 100);
        ((1..=12).contains(&month) && (1..=31).contains(&day)).then(|| Self { parts, text: text.to_owned() })
    }
}

impl fmt::Display for Date {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.text)
    }
}

/// Returns the newest release that the listing at `index` links to.
///
/// # Errors
/// Returns an error if the listing links to no dated release.
pub(super) fn newest(listing: &str, index: &Url, pattern: &Pattern) -> Result<Date> {
    let names: Vec<_> = links(listing).iter().filter_map(|link| child(index, link)).collect();
    let newest = names.iter().filter_map(|name| pattern.date_in(name)).max();
    let seen = names.iter().take(8).map(String::as_str).collect::<Vec<_>>().join(", ");
    ensure!(!names.is_empty(), "the page is not a directory listing: it has no link below itself");
    newest.with_context(|| {
        let links = names.len();
        format!("no dated release among {links} links ({seen}, …): compare with the entry's `release`")
    })
}

/// Returns the name of the target of `link` if the target lies directly in `index`. Links to the parent, to other
/// hosts, and to the listing in another order do not count.
fn child(index: &Url, link: &str) -> Option<String> {
    let target = index.join(link.trim()).ok()?;
    let path = target.path().strip_prefix(index.path())?;
    let name = path.strip_suffix('/').unwrap_or(path);
    let inside = target.origin() == index.origin() && target.query().is_none();
    (inside && !name.is_empty() && !name.contains('/')).then(|| name.to_owned())
}

/// Returns the `href` of each `<a>` outside of comments.
fn links(html: &str) -> Vec<String> {
    let Ok(tokens) = Tokenizer::new(html).collect::<Result<Vec<_>, Infallible>>();
    let tags = tokens.iter().filter_map(|token| match token {
        Token::StartTag(tag) if **tag.name == *b"a" => tag.attributes.get(&b"href"[..]),
        _ => None,
    });
    tags.map(|href| String::from_utf8_lossy(href).into_owned()).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn date(text: &str) -> Date {
        Date::parse(text).unwrap_or_else(|| panic!("{text} is a date"))
    }

    #[test]
    fn dates_are_compared_as_numbers() {
        let table = [
            ("20260705", "20260905"),
            ("20251231", "20260101"),
            ("20260712-900", "20260712-2537"),
            ("20260712", "20260712-1"),
            ("20260712.9", "20260712.10"),
            ("20260712-2537", "20260713-1"),
        ];
        for (older, newer) in table {
            assert!(date(older) < date(newer), "{older} is older than {newer}");
        }
        for no_date in [
            "",
            "daily",
            "2026",
            "20261301",
            "20260732",
            "20260700",
            "202607055",
            "20260705-",
            "20260705-rc1",
        ] {
            assert_eq!(Date::parse(no_date), None, "{no_date}");
        }
    }

    #[test]
    fn a_pattern_finds_its_own_directories() {
        let ubuntu = Pattern::parse("release-{date}").unwrap();
        assert_eq!(ubuntu.date_in("release-20260705"), Some(date("20260705")));
        assert_eq!(ubuntu.directory(&date("20260905")), "release-20260905");
        for other in ["release", "20260705", "release-20260705-beta", "prerelease-20260705"] {
            assert_eq!(ubuntu.date_in(other), None, "{other}");
        }
        for wrong in ["release", "{date}/{date}", "{date}-{date}", "releases/{date}"] {
            assert!(Pattern::parse(wrong).unwrap_err().to_string().contains("one {date}"), "{wrong}");
        }
    }

    #[test]
    fn links_are_read_as_servers_write_them() {
        let html = r#"<A HREF='one/'>1</A> <a class="x > y" href = "two/">2</a><a href=three/>3</a>
            <!-- <a href="hidden/"> --> <abbr href="no"> <a name="n"> <img src="a.png" href="no"><a href="#;
        // The last tag is cut off.
        assert_eq!(links(html), ["one/", "two/", "three/"]);
    }

    #[test]
    fn only_what_lies_in_the_directory_counts() {
        let index = Url::parse("https://publisher.example/releases/noble/").unwrap();
        let table = [
            ("release-20260705/", Some("release-20260705")),
            ("./release-20260705/", Some("release-20260705")),
            ("/releases/noble/release-20260705/", Some("release-20260705")),
            ("https://publisher.example/releases/noble/release-20260705", Some("release-20260705")),
            ("//publisher.example/releases/noble/x/", Some("x")),
            ("?C=N;O=D", None),
            ("../", None),
            ("/releases/", None),
            ("", None),
            ("#top", None),
            ("release-20260705/SHA256SUMS", None),
            ("https://elsewhere.example/releases/noble/release-20990101/", None),
            ("http://publisher.example/releases/noble/release-20990101/", None),
            ("https://[", None),
        ];
        for (link, expected) in table {
            assert_eq!(child(&index, link).as_deref(), expected, "{link:?}");
        }
    }

    #[test]
    fn a_page_without_a_release_is_told_apart_from_no_listing() {
        let index = Url::parse("https://publisher.example/noble/").unwrap();
        let pattern = Pattern::parse("release-{date}").unwrap();
        let message = |page: &str| newest(page, &index, &pattern).unwrap_err().to_string();
        assert!(message("<h1>Hello</h1>").contains("not a directory listing"));
        assert!(message(r#"<a href="release/">"#).contains("no dated release among 1 links (release"));
    }
}
