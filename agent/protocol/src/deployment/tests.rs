//! Tests of the documents of deployments.

use super::*;

pub(crate) const WHOLE: &str = r#"{"version":1,"kind":"podman-container","spec":{
    "image":"localhost/web:3","pull":"always","command":["/web","-v"],"env":{"A":"b"},
    "ports":[{"host":8080,"container":80}],
    "volumes":[{"name":"data","mount":"/data"}],
    "restart":"on-failure","stop_signal":"SIGINT","stop_seconds":30,"probation_seconds":5,"limits":{"memory_mib":64,"millicpus":500,"processes":20,"open_files":64}}}"#;

#[test]
fn a_document_survives_a_round_trip() {
    let document = Document::parse(WHOLE.as_bytes()).unwrap();
    let Deployment::PodmanContainer(spec) = &document.deployment;
    assert_eq!((spec.image.as_str(), spec.restart), ("localhost/web:3", Restart::OnFailure));
    assert!(spec.follows_tag() && !ContainerSpec::of("localhost/web:3").follows_tag());
    let fixed = ContainerSpec { image: "localhost/web@sha256:00".into(), ..spec.clone() };
    assert!(!fixed.follows_tag());
    assert_eq!(Document::parse(&document.to_bytes()).unwrap(), document);
    let least = Document::parse(
        br#"{"version":1,"kind":"podman-container","spec":{"image":"registry.example:5000/a/b@sha256:00"}}"#,
    );
    assert_eq!(
        least.unwrap(),
        Document::of(Deployment::PodmanContainer(ContainerSpec::of("registry.example:5000/a/b@sha256:00")))
    );
}

#[test]
fn invalid_documents_are_refused_with_a_reason() {
    let table = [
        ("{", "not JSON"),
        ("[]", "not a JSON object"),
        ("{}", "version: expected the whole number 1"),
        (r#"{"version":2,"kind":"podman-container","spec":{}}"#, "version: expected the whole number 1"),
        (r#"{"version":1,"kind":"wasm","spec":{}}"#, "kind: expected \"podman-container\""),
        (r#"{"version":1,"spec":{}}"#, "kind: expected"),
        (r#"{"version":1,"kind":"podman-container"}"#, "spec: expected an object"),
        (r#"{"version":1,"kind":"podman-container","spec":{}}"#, "spec.image: expected a string"),
    ];
    for (text, expected) in table {
        let refusal = Document::parse(text.as_bytes()).unwrap_err();
        assert!(refusal.0.contains(expected), "{text}: {refusal:?} does not contain {expected:?}");
    }
    let changes = [
        ("localhost/web:3", "web", "must name its registry"),
        ("localhost/web:3", "localhost/web", "must name its registry"),
        ("localhost/web:3", "docker.io/web:", "must name its registry"),
        ("localhost/web:3", "me:s3cret@docker.io/web:3", "must name its registry"),
        ("localhost/web:3", "https://me:s3cret@docker.io/web:3", "must name its registry"),
        ("\"A\":", "\"A=\":", "spec.env[0]: a name"),
        ("\"host\":8080", "\"host\":0", "0 is not a valid port"),
        ("\"host\":8080", "\"host\":80800", "spec.ports[0].host: expected a whole number"),
        ("\"name\":\"data\"", "\"name\":\"../data\"", "spec.volumes[0].name: expected"),
        ("\"/data\"", "\"data\"", "spec.volumes[0].mount: expected an absolute path"),
        ("\"/data\"", "\"/a/../../b\"", "spec.volumes[0].mount: expected an absolute path"),
        ("on-failure", "sometimes", "spec.restart: expected"),
        ("\"always\"", "\"never\"", "spec.pull: expected \"missing\" or \"always\""),
        ("SIGINT", "SIGSTOP", "spec.stop_signal: expected"),
        ("\"stop_seconds\":30", "\"stop_seconds\":121", "spec.stop_seconds: must be at most 120"),
        (
            "\"probation_seconds\":5",
            "\"probation_seconds\":3601",
            "spec.probation_seconds: must be at most 3600",
        ),
        ("\"memory_mib\":64", "\"memory_mib\":1", "spec.limits.memory_mib: must be at least 4"),
        ("\"restart\"", "\"privileged\":true,\"restart\"", "\"privileged\" is unknown"),
    ];
    for (from, to, expected) in changes {
        let text = WHOLE.replacen(from, to, 1);
        assert_ne!(text, WHOLE, "{from}");
        let refusal = Document::parse(text.as_bytes()).unwrap_err();
        assert!(refusal.0.contains(expected), "{to}: {refusal:?} does not contain {expected:?}");
    }
}
