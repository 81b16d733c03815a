//! Sabotages of the honest disk, each of which one rule must find.

use super::*;

/// What a sabotage does to the honest disk, the rule that finds it, and words of the loss.
type Sabotage = (fn(&Disk), Rule, &'static [&'static str]);

const SABOTAGES: &[Sabotage] = &[
    (
        |disk| disk.empty(STATE),
        Rule::StateWhole,
        &["truncated", "falls back to revision 6", "revision 8 at entry 80"],
    ),
    (|disk| disk.remove(STATE), Rule::StateWhole, &["/state is missing", "revision 8 at entry 80"]),
    (|disk| disk.write(STATE, &state(8, &[])[..100]), Rule::StateWhole, &["its digest does not match"]),
    (
        |disk| {
            disk.write(
                STATE,
                state(7, &[("web", 7, Wish::Put(document(2))), ("job", 6, Wish::Put(document(1)))]),
            )
        },
        Rule::StateAcknowledged,
        &["has revision 7", "acknowledged revision 8 at entry 80"],
    ),
    (
        |disk| disk.write(STATE, state(9, &[("web", 9, Wish::Purge)])),
        Rule::StateNotAhead,
        &["has revision 9", "only revisions up to 8"],
    ),
    (
        |disk| {
            disk.write(
                STATE,
                state(8, &[("web", 7, Wish::Put(document(2))), ("job", 6, Wish::Put(document(1)))]),
            )
        },
        Rule::StateDocuments,
        &["has a document of job, which was deleted at revision 8"],
    ),
    (
        |disk| disk.write(STATE, state(8, &[("web", 5, Wish::Put(document(1)))])),
        Rule::StateDocuments,
        &["a document of web that is not the one of revision 7"],
    ),
    (|disk| disk.write(STATE, state(8, &[])), Rule::StateDocuments, &["lacks the deployment web"]),
    (
        |disk| {
            let deployments = [("web", 7, Wish::Put(document(2))), ("new", 7, Wish::Put(document(1)))];
            disk.write(STATE, state(8, &deployments));
        },
        Rule::StateDocuments,
        &["new, which had not been put"],
    ),
    (|disk| disk.empty(&starts("web")), Rule::VolumeWhole, &["web.data/_data/starts is empty"]),
    (
        |disk| disk.write(&starts("job"), "\0\0"),
        Rule::VolumeWhole,
        &["job.data/_data/starts is not a number"],
    ),
    (
        |disk| disk.write(&starts("web"), "3\n"),
        Rule::VolumeAcknowledged,
        &["has 3 starts", "4 starts at entry 90"],
    ),
    (|disk| disk.remove(&starts("web")), Rule::VolumeAcknowledged, &["is missing", "4 starts at entry 90"]),
    (
        |disk| disk.write(&executable_path(2), &executable(2)[..4096]),
        Rule::Executable,
        &["ends after 4096 of 10000 bytes", "\"the agent under test\" succeeded at entry 30"],
    ),
    (
        |disk| disk.write(&executable_path(2), [&executable(2)[..4096], &[0; 5904]].concat()),
        Rule::Executable,
        &["differs from byte 4096 on, with only zeros there"],
    ),
    (|disk| disk.empty(&executable_path(2)), Rule::Executable, &["is empty"]),
    (|disk| disk.install(1), Rule::Executable, &["the old agent", "may not be installed"]),
    (|disk| disk.install(3), Rule::Executable, &["another agent", "may not be installed"]),
    (|disk| disk.install(4), Rule::Executable, &["none of the executables"]),
    (|disk| disk.remove(&executable_path(2)), Rule::Executable, &["which is missing"]),
    (|disk| disk.remove(LINK), Rule::Executable, &["/usr/local/bin/iot-agent is missing"]),
    (
        |disk| {
            disk.remove(LINK);
            disk.write(LINK, executable(2));
        },
        Rule::Executable,
        &["is not a link"],
    ),
    (
        |disk| disk.remove("/etc/systemd/system/iot-agent.service"),
        Rule::InstalledFile,
        &["iot-agent.service is missing", "succeeded at entry 30"],
    ),
    (|disk| disk.empty("/etc/systemd/system/iot-readahead.service"), Rule::InstalledFile, &["is empty"]),
    (
        |disk| disk.write("/etc/iot-agent/config.toml", "[agen"),
        Rule::InstalledFile,
        &["ends after 5 of 8 bytes"],
    ),
    (|disk| disk.empty("/etc/iot-agent/secrets/device.creds"), Rule::InstalledFile, &["is empty"]),
    (
        |disk| disk.empty("/etc/systemd/system/user@987.service.d/iot-agent.conf"),
        Rule::InstalledFile,
        &["is empty"],
    ),
    (
        |disk| disk.empty("/var/lib/iot-agent/.config/containers/storage.conf"),
        Rule::InstalledFile,
        &["is empty"],
    ),
    (
        |disk| disk.link("/etc/systemd/system/multi-user.target.wants/iot-agent.service", "/dev/null"),
        Rule::InstalledFile,
        &["leads to \"/dev/null\""],
    ),
    (|disk| disk.remove("/var/lib/systemd/linger/iot-agent"), Rule::InstalledFile, &["is missing"]),
    (|disk| disk.empty("/etc/passwd"), Rule::InstalledFile, &["no user iot-agent"]),
    (
        |disk| disk.write(&format!("{STORAGE}/overlay-layers/layers.json"), "[{"),
        Rule::StorageList,
        &["layers.json is not a list", "EOF"],
    ),
    (
        |disk| disk.empty(&format!("{STORAGE}/overlay-images/images.json")),
        Rule::StorageList,
        &["it is empty"],
    ),
    (
        |disk| disk.write(&format!("{STORAGE}/overlay-containers/containers.json"), "\0\0"),
        Rule::StorageList,
        &["containers.json is not a list"],
    ),
    (
        |disk| disk.write(&format!("{STORAGE}/overlay-images/images.json"), "[]"),
        Rule::ImageAcknowledged,
        &["lacks the image localhost/iot-workload:1", "entry 60"],
    ),
    (|disk| disk.empty(&program()), Rule::ImageComplete, &["diff/workload is empty", "recorded the image"]),
    (
        |disk| disk.write(&program(), vec![0; workload().len()]),
        Rule::ImageComplete,
        &["differs from byte 0 on, with only zeros there"],
    ),
    (|disk| disk.remove(&program()), Rule::ImageComplete, &["is in no layer"]),
    (
        |disk| {
            disk.write(
                &format!("{STORAGE}/overlay-layers/layers.json"),
                format!(r#"[{{"id":"{LAYER}","parent":"cc33"}}]"#),
            )
        },
        Rule::ImageComplete,
        &["lacks the layer cc33"],
    ),
    (
        |disk| {
            let layers = format!(
                r#"[{{"id":"cc33"}},{{"id":"{LAYER}","parent":"cc33","flags":{{"incomplete":true}}}}]"#
            );
            disk.write(&format!("{STORAGE}/overlay-layers/layers.json"), layers);
        },
        Rule::ImageComplete,
        &["marks the layer aa11 as incomplete"],
    ),
    (
        |disk| fs::remove_dir(disk.files.path(&format!("{STORAGE}/overlay/cc33/diff"))).unwrap(),
        Rule::ImageComplete,
        &["cc33/diff is missing"],
    ),
    (
        |disk| disk.empty(&format!("{STORAGE}/overlay/cc33/link")),
        Rule::ImageComplete,
        &["link is empty or missing"],
    ),
    (
        |disk| disk.remove(&format!("{STORAGE}/overlay/l/SHORTaa11")),
        Rule::ImageComplete,
        &["SHORTaa11 is missing"],
    ),
    (
        |disk| disk.empty(&format!("{STORAGE}/overlay/{LAYER}/lower")),
        Rule::ImageComplete,
        &["lower is empty"],
    ),
    (
        |disk| disk.empty(&format!("{STORAGE}/overlay-images/{ID}/manifest")),
        Rule::ImageComplete,
        &["manifest is empty"],
    ),
    (
        |disk| disk.write(&format!("{STORAGE}/overlay-images/{ID}/=c2hhMjU2OjFm"), "x"),
        Rule::ImageComplete,
        &["does not have the digest"],
    ),
    (
        |disk| fs::create_dir(disk.files.path("/var/lib/iot-agent/fetching").join("x")).unwrap(),
        Rule::FileSystem,
        &["cannot be read from the file system"],
    ),
];

#[test]
fn each_sabotage_is_found_by_its_rule_alone() {
    for (number, (sabotage, rule, words)) in SABOTAGES.iter().enumerate() {
        let disk = Disk::honest();
        fs::create_dir_all(disk.files.path("/var/lib/iot-agent/fetching")).unwrap();
        sabotage(&disk);
        let judgement = disk.judged(END);
        let rules: Vec<_> = judgement.losses.iter().map(|loss| loss.rule).collect();
        assert_eq!(rules, [*rule], "sabotage {number}: {:?}", judgement.losses);
        let text = &judgement.losses[0].text;
        assert!(words.iter().all(|words| text.contains(words)), "sabotage {number}: {text}");
        assert!(text.ends_with('.') && judgement.is_odd, "sabotage {number}: {text}");
    }
}
