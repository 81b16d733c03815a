//! Decides from the status and the headers of an answer how a download goes on. This module does no I/O.

use std::time::{Duration, SystemTime};

use reqwest::StatusCode;
use reqwest::header::{
    CONTENT_LENGTH, CONTENT_RANGE, ETAG, HeaderMap, HeaderName, LAST_MODIFIED, RETRY_AFTER,
};

/// A request for a part of a file.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct PartRequest {
    /// The number of bytes that are on disk.
    pub(super) from: u64,
    /// The size of the whole file, if the server reported it when it sent those bytes.
    pub(super) total: Option<u64>,
    /// The value for If-Range. It names the version of the file to which those bytes belong.
    pub(super) validator: String,
}

/// The next step after the head of an answer.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum ResponseKind {
    /// The body is the file from its beginning.
    Whole { total: Option<u64> },
    /// The body is the missing rest of the file.
    Rest { total: u64 },
    /// The server cannot send this part: request the whole file.
    StartOver(String),
    /// Another attempt may succeed, but not before the pause `after`.
    Passing { what: String, after: Option<Duration> },
    /// The proxy requires credentials.
    ProxyRefuses(String),
    /// Another attempt would get the same answer.
    Final { what: String, hint: &'static str },
}

/// Reads the head of an answer. `asked` is the part that was requested, if any.
pub(super) fn read(status: StatusCode, headers: &HeaderMap, asked: Option<&PartRequest>) -> ResponseKind {
    let what = format!("the server answers {status}");
    let hint = match (status.as_u16(), asked) {
        (200, _) => {
            let total = text(headers, &CONTENT_LENGTH).and_then(|text| text.parse().ok());
            return ResponseKind::Whole { total };
        }
        (206, Some(asked)) => return rest(headers, asked),
        (416, Some(_)) => return ResponseKind::StartOver(what),
        (407, _) => return ResponseKind::ProxyRefuses(format!("the proxy answers {status}")),
        (408 | 425 | 429 | 500 | 502 | 503 | 504, _) => {
            return ResponseKind::Passing { what, after: retry_after(headers) };
        }
        (401 | 403, _) => "check whether the URL needs credentials: https://user:password@host/path",
        (404 | 410, _) => {
            "check the URL; publishers move old files away, and `cargo xtask image bump` pins newer ones"
        }
        _ => "open the URL in a browser; if it works there, contact its publisher",
    };
    ResponseKind::Final { what, hint }
}

/// Checks that an answer with the status 206 contains the part that was requested.
fn rest(headers: &HeaderMap, asked: &PartRequest) -> ResponseKind {
    let is_other = |etag: &str| asked.validator.starts_with('"') && etag != asked.validator;
    ResponseKind::StartOver(match text(headers, &CONTENT_RANGE).and_then(content_range) {
        None => "the server's answer does not say which byte range it sends".to_owned(),
        Some((from, _)) if from != asked.from => {
            format!("the server sends the bytes from {from}, requested were those from {}", asked.from)
        }
        Some((_, total)) if asked.total.is_some_and(|known| known != total) => {
            format!("the file has {total} bytes now")
        }
        Some(_) if strong_etag(headers).is_some_and(is_other) => {
            "the byte range is from another version of the file".to_owned()
        }
        Some((_, total)) => return ResponseKind::Rest { total },
    })
}

/// Parses `bytes 100-199/200` into the first byte and the total: 100 and 200.
fn content_range(text: &str) -> Option<(u64, u64)> {
    let (range, total) = text.strip_prefix("bytes ")?.split_once('/')?;
    let (from, to) = range.split_once('-')?;
    let (from, to, total): (u64, u64, u64) = (from.parse().ok()?, to.parse().ok()?, total.parse().ok()?);
    (from <= to && to < total).then_some((from, total))
}

/// Returns the value for If-Range: a strong ETag if there is one. Otherwise, the value is the time of the last change,
/// but only if a digest will be checked, because that time is precise only to the second.
pub(super) fn validator(headers: &HeaderMap, has_digest: bool) -> Option<String> {
    strong_etag(headers).or_else(|| text(headers, &LAST_MODIFIED).filter(|_| has_digest)).map(str::to_owned)
}

fn strong_etag(headers: &HeaderMap) -> Option<&str> {
    text(headers, &ETAG).filter(|etag| etag.starts_with('"'))
}

fn text<'a>(headers: &'a HeaderMap, name: &HeaderName) -> Option<&'a str> {
    headers.get(name)?.to_str().ok()
}

/// Parses Retry-After, which is a number of seconds or a date.
fn retry_after(headers: &HeaderMap) -> Option<Duration> {
    let text = text(headers, &RETRY_AFTER)?;
    if let Ok(seconds) = text.parse::<u32>() {
        return Some(Duration::new(seconds.into(), 0));
    }
    let then = httpdate::parse_http_date(text).ok()?;
    Some(then.duration_since(SystemTime::now()).unwrap_or_default())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn headers(of: &[(&HeaderName, &str)]) -> HeaderMap {
        of.iter().map(|(name, value)| ((*name).clone(), value.parse().unwrap())).collect()
    }

    fn asked() -> PartRequest {
        PartRequest { from: 100, total: Some(200), validator: "\"a\"".to_owned() }
    }

    #[test]
    fn a_part_must_be_the_one_that_was_asked_for() {
        let table = [
            ("bytes 100-199/200", "\"a\"", true),
            ("bytes 100-149/200", "\"a\"", true),
            ("bytes 0-199/200", "\"a\"", false),
            ("bytes 100-199/300", "\"a\"", false),
            ("bytes 100-199/200", "\"b\"", false),
            ("bytes 100-199/*", "\"a\"", false),
            ("bytes 100-200/200", "\"a\"", false),
            ("bytes 199-100/200", "\"a\"", false),
            ("rows 100-199/200", "\"a\"", false),
        ];
        for (range, etag, fits) in table {
            let headers = headers(&[(&CONTENT_RANGE, range), (&ETAG, etag)]);
            let answer = read(StatusCode::PARTIAL_CONTENT, &headers, Some(&asked()));
            assert_eq!(answer == ResponseKind::Rest { total: 200 }, fits, "{range} {etag}: {answer:?}");
            assert!(fits || matches!(answer, ResponseKind::StartOver(_)), "{range} {etag}: {answer:?}");
        }
        let bare = read(StatusCode::PARTIAL_CONTENT, &HeaderMap::new(), Some(&asked()));
        assert!(matches!(bare, ResponseKind::StartOver(_)), "{bare:?}");
    }

    #[test]
    fn statuses_are_passing_or_final() {
        let no_headers = HeaderMap::new();
        let read =
            |code, asked: Option<&PartRequest>| read(StatusCode::from_u16(code).unwrap(), &no_headers, asked);
        for code in [408, 425, 429, 500, 502, 503, 504] {
            assert!(matches!(read(code, None), ResponseKind::Passing { after: None, .. }), "{code}");
        }
        for code in [204, 206, 304, 400, 401, 403, 404, 410, 416, 501, 505] {
            assert!(matches!(read(code, None), ResponseKind::Final { .. }), "{code}");
        }
        assert!(matches!(read(407, None), ResponseKind::ProxyRefuses(_)));
        assert!(matches!(read(416, Some(&asked())), ResponseKind::StartOver(_)));
        assert_eq!(read(200, Some(&asked())), ResponseKind::Whole { total: None });
    }

    #[test]
    fn a_server_may_ask_for_patience() {
        let after = |text| retry_after(&headers(&[(&RETRY_AFTER, text)])).map(|after| after.as_secs());
        assert_eq!(after("120"), Some(120));
        assert_eq!(after("Wed, 21 Oct 2015 07:28:00 GMT"), Some(0));
        assert!(after("Wed, 21 Oct 2065 07:28:00 GMT").unwrap() > 1_000_000_000);
        assert_eq!(after("soon"), None);
    }

    #[test]
    fn only_what_tells_versions_apart_is_a_validator() {
        let date = "Wed, 21 Oct 2015 07:28:00 GMT";
        let table = [
            (vec![(&ETAG, "\"a\""), (&LAST_MODIFIED, date)], true, Some("\"a\"")),
            (vec![(&ETAG, "W/\"a\""), (&LAST_MODIFIED, date)], true, Some(date)),
            (vec![(&LAST_MODIFIED, date)], false, None),
            (vec![(&ETAG, "W/\"a\"")], true, None),
            (vec![], true, None),
        ];
        for (given, has_digest, expected) in table {
            assert_eq!(validator(&headers(&given), has_digest).as_deref(), expected, "{given:?}");
        }
    }
}
