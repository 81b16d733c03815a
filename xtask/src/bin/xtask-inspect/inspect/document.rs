//! The reports for programs: JSON, and SARIF 2.1.0 (OASIS, Static Analysis Results Interchange Format).

use inspect::finding::{CHECKS, Finding, SCHEMA, Severity};
use percent_encoding::{AsciiSet, CONTROLS, utf8_percent_encode};
use serde_json::{Value, json};
use xtask_core::format::round;
use xtask_inspection::{DeviceRoot, Inspection};

use super::collection::{Collection, Subject};
use super::policy::Accepted;
use super::verdict::{Judged, verdict};

/// The characters that a path in a URI reference does not contain as they are (RFC 3986, 3.3).
const NOT_IN_A_PATH: &AsciiSet = &CONTROLS
    .add(b' ')
    .add(b'"')
    .add(b'#')
    .add(b'%')
    .add(b'<')
    .add(b'>')
    .add(b'?')
    .add(b'[')
    .add(b']')
    .add(b'^')
    .add(b'`')
    .add(b'{')
    .add(b'|')
    .add(b'}')
    .add(b'\\')
    .add(b':');

/// Returns the report of one file, or that of many files with a list of them.
pub(super) fn report(judged: &[Judged], collection: &Collection, seconds: f64) -> Value {
    let mut files: Vec<Value> = judged
        .iter()
        .zip(&collection.subjects)
        .map(|(judged, subject)| file(judged, subject, &collection.judges[subject.judge].inspection))
        .collect();
    let verdict = verdict(judged, collection);
    if collection.is_single
        && let Some(Value::Object(mut only)) = files.pop()
    {
        only.insert("schema".to_owned(), SCHEMA.into());
        only.insert("seconds".to_owned(), round(seconds).into());
        return Value::Object(only);
    }
    json!({
        "schema": SCHEMA,
        "verdict": verdict,
        "files": files,
        "not_judged": { "objects": collection.objects, "not_read": collection.unreadable },
        "seconds": round(seconds),
    })
}

fn file(judged: &Judged, subject: &Subject, inspection: &Inspection) -> Value {
    let findings = judged.findings().map(|(finding, accepted)| {
        let mut value = json!(finding);
        if let Some(accepted) = accepted {
            value["accepted"] = json!(accepted);
        }
        value
    });
    let mut value = json!({
        "verdict": judged.verdict(),
        "file": { "path": judged.name, "bytes": subject.bytes() },
        "target": target(inspection),
        "findings": findings.collect::<Vec<_>>(),
    });
    if let Some(container) = &subject.container {
        value["container"] =
            json!({ "path": container, "layer": subject.layer, "entrypoint": subject.is_entrypoint });
    }
    value
}

fn target(inspection: &Inspection) -> Value {
    let libraries = match &inspection.place {
        DeviceRoot::Image(image, None) => json!({
            "from": image.name, "known": "release",
            "glibc": image.expected.as_ref().map(|expected| &expected.glibc),
        }),
        DeviceRoot::Image(image, Some(inventory)) => json!({
            "from": image.name, "known": "all", "source": inventory.source,
            "libraries": inventory.libraries.len(),
        }),
        DeviceRoot::Sysroot(..) => json!({ "from": inspection.name(), "known": "all" }),
    };
    json!({
        "arch": inspection.arch, "device": inspection.device.name, "about": inspection.device.about,
        "libraries": libraries,
    })
}

/// Returns the findings as the log of one run. Facts are left out.
pub(super) fn sarif(judged: &[Judged], collection: &Collection) -> Value {
    let rules = CHECKS.iter().map(|(id, about)| json!({ "id": id, "shortDescription": { "text": about } }));
    let results = judged.iter().zip(&collection.subjects).flat_map(|(judged, subject)| {
        let found = judged.findings().filter(|(finding, _)| finding.severity > Severity::Informs);
        let place = place(&judged.name, subject.bytes());
        found.map(move |(finding, accepted)| result(&judged.name, &place, finding, accepted))
    });
    json!({
        "$schema": "https://json.schemastore.org/sarif-2.1.0.json",
        "version": "2.1.0",
        "runs": [{
            "tool": { "driver": {
                "name": "cargo xtask inspect",
                "semanticVersion": env!("CARGO_PKG_VERSION"),
                "rules": rules.collect::<Vec<_>>(),
            } },
            "results": results.collect::<Vec<_>>(),
        }],
    })
}

/// Returns the location of a whole file. A URI reference does not begin with a slash, so an absolute path becomes a URI.
fn place(file: &str, bytes: Option<u64>) -> Value {
    let path = utf8_percent_encode(file, NOT_IN_A_PATH).to_string();
    let uri = if file.starts_with('/') { format!("file://{path}") } else { path };
    let mut place = json!({ "artifactLocation": { "uri": uri } });
    if let Some(bytes) = bytes {
        place["region"] = json!({ "byteOffset": 0, "byteLength": bytes });
    }
    json!({ "physicalLocation": place })
}

fn result(file: &str, place: &Value, finding: &Finding, accepted: Option<Accepted>) -> Value {
    let level = if finding.severity == Severity::Refused { "error" } else { "warning" };
    let texts =
        [finding.found.clone(), label("the target", &finding.offers), label("what to do", &finding.remedy)];
    let text = texts.into_iter().filter(|text| !text.is_empty()).collect::<Vec<_>>().join("\n");
    let mut value = json!({
        "ruleId": finding.id,
        "ruleIndex": CHECKS.iter().position(|(id, _)| *id == finding.id),
        "level": level,
        "message": { "text": text },
        "locations": [place],
        "partialFingerprints": { "fileAndCheck/v1": format!("{file} {}", finding.id) },
    });
    if let Some(accepted) = accepted {
        value["suppressions"] = json!([{ "kind": "external", "justification": accepted.reason() }]);
    }
    value
}

fn label(what: &str, text: &str) -> String {
    if text.is_empty() { String::new() } else { format!("{what}: {text}") }
}

#[cfg(test)]
mod tests {
    use inspect::finding::Report;
    use xtask_core::cli::InspectArgs;

    use super::super::collection::Content;
    use super::super::policy::Policy;
    use super::*;

    #[test]
    fn sarif_has_a_result_for_each_finding_that_is_no_fact() {
        let findings = vec![
            Finding::refused("needed", "it needs liba.so", "debian-12 has none", "install it"),
            Finding::warned("rpath", "it names /build", "", ""),
            Finding::informs("size", "1 byte"),
        ];
        let args = InspectArgs { allow: vec!["rpath".to_owned()], ..InspectArgs::default() };
        let judged =
            Judged::new("a b/c.so".to_owned(), Report::new(findings), &Policy::from_args(&args).unwrap());
        let subject = Subject::new("a b/c.so".to_owned(), Content::Judged(Report::new(Vec::new())), 0);
        let collection = Collection { subjects: vec![subject], ..Collection::default() };
        let log = sarif(&[judged], &collection);
        let run = &log["runs"][0];
        let results = run["results"].as_array().unwrap();
        assert_eq!(results.len(), 2);
        let text = "it needs liba.so\nthe target: debian-12 has none\nwhat to do: install it";
        assert_eq!((&results[0]["level"], &results[0]["message"]["text"]), (&json!("error"), &json!(text)));
        let rule = usize::try_from(results[0]["ruleIndex"].as_u64().unwrap()).unwrap();
        assert_eq!(run["tool"]["driver"]["rules"][rule]["id"], "needed");
        let location = &results[0]["locations"][0]["physicalLocation"]["artifactLocation"]["uri"];
        assert_eq!(location, "a%20b/c.so");
        let absolute = &place("/a/c.so", Some(7))["physicalLocation"];
        assert_eq!(absolute["artifactLocation"]["uri"], "file:///a/c.so");
        assert_eq!(absolute["region"]["byteLength"], 7);
        assert_eq!(results[0]["suppressions"], Value::Null);
        let suppression = json!({ "kind": "external", "justification": "accepted by --allow" });
        assert_eq!(results[1]["suppressions"], json!([suppression]));
    }
}
