//! The operation of an entry of the bucket: a Put, a Delete or a Purge.

use async_nats::HeaderMap;
use async_nats::header::NATS_MARKER_REASON;

use crate::desired::Operation;

/// The header with the operation that a client requests (NATS ADR-8).
const KV_OPERATION: &str = "KV-Operation";

/// Returns the operation of an entry, or `None` if the headers name an operation that the agent does not know.
///
/// nats-server 2.11 and later write a marker when they remove the last entry of a key themselves (NATS ADR-48).
/// The marker has no body, and a header with the reason. ADR-48 asks clients to treat `MaxAge` like a purge. A purge
/// in this sense removes a key with its history. The agent keeps the volumes in this case, because an
/// expired entry does not ask for the deletion of data.
pub(crate) fn operation(headers: Option<&HeaderMap>, payload: &[u8]) -> Option<Operation> {
    let header = |name| headers.and_then(|headers| headers.get(name)).map(|value| value.as_str());
    match (header(KV_OPERATION), header(NATS_MARKER_REASON.as_ref())) {
        (Some("DEL"), _) | (None, Some("MaxAge" | "Remove")) => Some(Operation::Delete),
        (Some("PURGE"), _) | (None, Some("Purge")) => Some(Operation::Purge),
        (None | Some("PUT"), None) => Some(match str::from_utf8(payload) {
            Ok(text) => Operation::Put(text.to_owned()),
            Err(error) => Operation::PutBinary(error.valid_up_to()),
        }),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    type Row = (&'static [(&'static str, &'static str)], Option<Operation>);

    #[test]
    fn headers_name_the_operation() {
        let put = || Some(Operation::Put("x".into()));
        let table: [Row; 11] = [
            (&[], put()),
            (&[("Nats-Expected-Last-Sequence", "3")], put()),
            (&[("KV-Operation", "PUT")], put()),
            (&[("KV-Operation", "DEL")], Some(Operation::Delete)),
            (&[("KV-Operation", "PURGE")], Some(Operation::Purge)),
            (&[("KV-Operation", "DEL"), ("Nats-Marker-Reason", "Purge")], Some(Operation::Delete)),
            (&[("Nats-Marker-Reason", "MaxAge")], Some(Operation::Delete)),
            (&[("Nats-Marker-Reason", "Remove")], Some(Operation::Delete)),
            (&[("Nats-Marker-Reason", "Purge")], Some(Operation::Purge)),
            (&[("Nats-Marker-Reason", "Rollup")], None),
            (&[("KV-Operation", "MOVE")], None),
        ];
        for (list, expected) in table {
            let mut headers = HeaderMap::new();
            for (name, value) in list {
                headers.insert(*name, *value);
            }
            assert_eq!(operation(Some(&headers), b"x"), expected, "{list:?}");
        }
        assert_eq!(operation(None, b"x"), put());
        assert_eq!(operation(None, b"ab\xff"), Some(Operation::PutBinary(2)));
    }
}
