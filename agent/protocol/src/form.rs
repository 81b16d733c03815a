//! The form of a document. serde's errors repeat the wrong value, which can be a secret. This check names the path of
//! the field and the expected type instead.

use std::net::IpAddr;

use serde_json::{Map, Value};

use super::deployment::{KINDS, VERSION};
use super::is_name;

/// The type of a JSON value.
enum Form {
    Text,
    Flag,
    /// A whole number from 0 to this one.
    Whole(u32),
    OneOf(&'static [&'static str]),
    /// An IP address as text.
    Address,
    List(&'static Form),
    /// An object with any names.
    Names(&'static Form),
    Object(&'static [Field]),
    Nullable(&'static Form),
}

/// A field of an object: its name, whether it must be there, and its form.
struct Field(&'static str, bool, Form);

const SPEC: Form = Form::Object(&[
    Field("image", true, Form::Text),
    Field("pull", false, Form::OneOf(&["missing", "always"])),
    Field("command", false, Form::List(&Form::Text)),
    Field("env", false, Form::Names(&Form::Text)),
    Field("ports", false, Form::List(&PORT)),
    Field("volumes", false, Form::List(&VOLUME)),
    Field("restart", false, Form::OneOf(&["always", "on-failure", "never"])),
    Field("limits", false, LIMITS),
    Field("stop_signal", false, Form::Nullable(&SIGNAL)),
    Field("stop_seconds", false, LIMIT),
    Field("probation_seconds", false, LIMIT),
]);

const SIGNAL: Form = Form::OneOf(&[
    "SIGHUP",
    "SIGINT",
    "SIGQUIT",
    "SIGKILL",
    "SIGUSR1",
    "SIGUSR2",
    "SIGTERM",
    "SIGWINCH",
    "SIGRTMIN+3",
]);

const PORT: Form = Form::Object(&[
    Field("host", true, Form::Whole(u16::MAX as u32)),
    Field("container", true, Form::Whole(u16::MAX as u32)),
    Field("address", false, Form::Nullable(&Form::Address)),
    Field("protocol", false, Form::OneOf(&["tcp", "udp"])),
]);

const VOLUME: Form = Form::Object(&[
    Field("name", true, Form::Text),
    Field("mount", true, Form::Text),
    Field("read_only", false, Form::Flag),
]);

const LIMIT: Form = Form::Nullable(&Form::Whole(u32::MAX));

const LIMITS: Form = Form::Object(&[
    Field("memory_mib", false, LIMIT),
    Field("millicpus", false, LIMIT),
    Field("processes", false, LIMIT),
    Field("open_files", false, LIMIT),
]);

/// Checks the form of a document.
///
/// # Errors
/// Returns an error that names the path of the first wrong field and the expected type.
pub(crate) fn check(document: &Value) -> Result<(), String> {
    let Some(fields) = document.as_object() else {
        return Err("the document is not a JSON object".to_owned());
    };
    if fields.get("version").and_then(Value::as_u64) != Some(VERSION) {
        return Err(format!("version: expected the whole number {VERSION}"));
    }
    if !fields.get("kind").and_then(Value::as_str).is_some_and(|kind| KINDS.contains(&kind)) {
        return Err(format!("kind: expected {}", quoted(&KINDS)));
    }
    SPEC.check("spec", fields.get("spec").unwrap_or(&Value::Null))
}

impl Form {
    fn check(&self, path: &str, value: &Value) -> Result<(), String> {
        let fits = match self {
            Self::Text => value.is_string(),
            Self::Flag => value.is_boolean(),
            Self::Whole(most) => value.as_u64().is_some_and(|number| number <= u64::from(*most)),
            Self::OneOf(words) => value.as_str().is_some_and(|word| words.contains(&word)),
            Self::Address => value.as_str().is_some_and(|text| text.parse::<IpAddr>().is_ok()),
            Self::Nullable(form) => return if value.is_null() { Ok(()) } else { form.check(path, value) },
            Self::List(form) => match value.as_array() {
                Some(list) => {
                    return each(list, |index, value| form.check(&format!("{path}[{index}]"), value));
                }
                None => false,
            },
            Self::Names(form) => match value.as_object() {
                Some(names) => {
                    return each(names, |index, (name, value)| {
                        // A text that is no name could be a value in the wrong place.
                        let place = if is_name(name) { format!(".{name}") } else { format!("[{index}]") };
                        form.check(&format!("{path}{place}"), value)
                    });
                }
                None => false,
            },
            Self::Object(fields) => match value.as_object() {
                Some(object) => return check_fields(fields, path, object),
                None => false,
            },
        };
        if fits { Ok(()) } else { Err(format!("{path}: expected {}", self.describe())) }
    }

    fn describe(&self) -> String {
        match self {
            Self::Text => "a string".to_owned(),
            Self::Flag => "true or false".to_owned(),
            Self::Whole(most) => format!("a whole number from 0 to {most}"),
            Self::OneOf(words) => quoted(words),
            Self::Address => "an IP address as a string".to_owned(),
            Self::List(_) => "an array".to_owned(),
            Self::Names(_) | Self::Object(_) => "an object".to_owned(),
            Self::Nullable(form) => form.describe(),
        }
    }
}

fn check_fields(fields: &[Field], path: &str, object: &Map<String, Value>) -> Result<(), String> {
    if let Some(unknown) = object.keys().find(|key| fields.iter().all(|Field(name, ..)| name != key)) {
        let unknown = if is_name(unknown) { format!("{unknown:?}") } else { "a field".to_owned() };
        let known = fields.iter().map(|Field(name, ..)| *name).collect::<Vec<_>>().join(", ");
        return Err(format!("{path}: {unknown} is unknown; known: {known}"));
    }
    for Field(name, required, form) in fields {
        match object.get(*name) {
            Some(value) => form.check(&format!("{path}.{name}"), value)?,
            None if *required => return Err(format!("{path}.{name}: expected {}", form.describe())),
            None => {}
        }
    }
    Ok(())
}

/// Checks all items until the first error.
fn each<T>(
    items: impl IntoIterator<Item = T>,
    check: impl Fn(usize, T) -> Result<(), String>,
) -> Result<(), String> {
    items.into_iter().enumerate().try_for_each(|(index, item)| check(index, item))
}

fn quoted(words: &[&str]) -> String {
    words.iter().map(|word| format!("{word:?}")).collect::<Vec<_>>().join(" or ")
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Deployment;
    use crate::deployment::tests::WHOLE;
    use serde_json::json;

    const SECRET: &str = "s3cret";

    /// Returns variants of `value` in which one value at any depth is replaced, removed or has a sibling.
    fn variants(value: &Value) -> Vec<Value> {
        let mut all = vec![
            json!(SECRET),
            json!(7_654_321),
            json!(-7),
            json!(1.5),
            json!(true),
            Value::Null,
            json!([SECRET]),
            json!({ SECRET: SECRET }),
            json!({}),
        ];
        match value {
            Value::Object(object) => {
                for (key, inner) in object {
                    let with = |inner: Option<Value>| {
                        let mut object = object.clone();
                        object.remove(key);
                        object.extend(inner.map(|inner| (key.clone(), inner)));
                        Value::Object(object)
                    };
                    all.push(with(None));
                    all.extend(variants(inner).into_iter().map(|inner| with(Some(inner))));
                }
                let mut more = object.clone();
                more.insert("x y".to_owned(), json!(SECRET));
                all.push(Value::Object(more));
            }
            Value::Array(list) => {
                for index in 0..list.len() {
                    all.extend(variants(&list[index]).into_iter().map(|inner| {
                        let mut list = list.clone();
                        list[index] = inner;
                        Value::Array(list)
                    }));
                }
            }
            _ => {}
        }
        all
    }

    /// The form must accept the documents that serde accepts. serde also accepts an array in place of an object.
    #[test]
    fn the_form_agrees_with_serde_and_shows_no_value() {
        let document: Value = serde_json::from_str(WHOLE).unwrap();
        check(&document).unwrap();
        let (mut wrong, mut right) = (0, 0);
        for spec in variants(&document["spec"]) {
            let mut document = document.clone();
            document["spec"] = spec;
            let parsed = serde_json::from_value::<Deployment>(document.clone());
            match check(&document) {
                Ok(()) => {
                    right += 1;
                    assert!(parsed.is_ok(), "{document}: {parsed:?}");
                }
                Err(error) => {
                    wrong += 1;
                    assert!(
                        parsed.is_err() || document.to_string().contains("[\"s3cret\"]"),
                        "{document}: {error}"
                    );
                    assert!(error.starts_with("spec"), "{error}");
                    assert!(!error.contains("7654321") && !error.contains("1.5"), "{error}");
                    assert!(!error.contains(SECRET) || error.contains("\"s3cret\" is unknown"), "{error}");
                }
            }
        }
        assert!(wrong > 100 && right > 10, "{wrong} {right}");
    }

    #[test]
    fn an_error_has_the_path_and_the_expected_type() {
        let table = [
            ("/spec/env", json!("TOKEN=s3cret"), "spec.env: expected an object"),
            ("/spec/env/A", json!(123_456), "spec.env.A: expected a string"),
            ("/spec/command/1", json!(5), "spec.command[1]: expected a string"),
            (
                "/spec/ports/0/host",
                json!("80"),
                "spec.ports[0].host: expected a whole number from 0 to 65535",
            ),
            ("/spec/volumes/0/mount", json!(null), "spec.volumes[0].mount: expected a string"),
            ("/spec/restart", json!(3), "spec.restart: expected \"always\" or \"on-failure\" or \"never\""),
            ("/spec/limits/memory_mib", json!("64M"), "spec.limits.memory_mib: expected a whole number"),
            ("/spec", json!([]), "spec: expected an object"),
            ("/version", json!("s3cret"), "version: expected the whole number 1"),
            ("/kind", json!("s3cret"), "kind: expected \"podman-container\""),
        ];
        for (path, value, expected) in table {
            let mut document: Value = serde_json::from_str(WHOLE).unwrap();
            *document.pointer_mut(path).unwrap() = value;
            let error = check(&document).unwrap_err();
            assert!(error.contains(expected), "{error:?} does not contain {expected:?}");
        }
    }
}
