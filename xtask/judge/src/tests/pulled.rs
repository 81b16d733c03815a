//! A device with two images: one that was loaded from an archive, and one that was pulled from a registry.

use serde_json::Value;

use super::*;

const PULLED: &str = "10.0.2.2:40123/iot-workload:1";
const PULLED_ID: &str = "ee55";
const PULLED_LAYER: &str = "ff66";

fn put(image: &str) -> Wish {
    Wish::Put(document(1).replace(IMAGE, image))
}

fn loaded(reference: &str) -> EventKind {
    EventKind::Loaded { reference: reference.to_owned() }
}

/// The deployment `web` goes on with the image of the archive, and `job` with that of the registry.
fn recording() -> Recording {
    let mut recording = judge_of(events()).recording;
    recording.events.retain(|event| event.position < 75);
    let later = [(80, desired("job", 8, put(PULLED))), (90, loaded(PULLED))];
    recording.events.extend(later.map(|(position, kind)| Event { position, kind }));
    let files = recording.images[IMAGE].clone();
    recording.images.insert(PULLED.to_owned(), files);
    recording
}

fn losses(disk: &Disk) -> Vec<Loss> {
    let known = judge_of(events()).known.0;
    let judge = Judge::new(recording(), known.into_values().collect()).unwrap();
    let losses = judge.judge_files(END, &disk.files).unwrap().losses;
    losses.into_iter().filter(|loss| loss.path.contains("/storage/")).collect()
}

/// Adds an entry to one of the storage's lists.
fn extend(disk: &Disk, list: &str, entry: Value) {
    let path = format!("{STORAGE}/{list}");
    let mut entries: Vec<Value> = serde_json::from_slice(&disk.files.read(&path).unwrap().unwrap()).unwrap();
    entries.push(entry);
    disk.write(&path, serde_json::to_string(&entries).unwrap());
}

/// The honest disk with the second image.
fn disk() -> Disk {
    let disk = Disk::honest();
    extend(&disk, "overlay-layers/layers.json", json!({ "id": PULLED_LAYER }));
    let image = json!({ "id": PULLED_ID, "names": [PULLED], "layer": PULLED_LAYER });
    extend(&disk, "overlay-images/images.json", image);
    disk.write(&format!("{STORAGE}/overlay/{PULLED_LAYER}/link"), "SHORTff66");
    disk.link(&format!("{STORAGE}/overlay/l/SHORTff66"), "../ff66/diff");
    disk.write(&program_of_pulled(), workload());
    disk.record("fetched", &format!("{PULLED}\n{PULLED_ID}"), &format!("{PULLED}\n{PULLED_ID}"));
    disk
}

fn program_of_pulled() -> String {
    format!("{STORAGE}/overlay/{PULLED_LAYER}/diff/workload")
}

#[test]
fn a_pulled_image_must_be_there_and_complete() {
    assert_eq!(losses(&disk()), []);
    let without = losses(&Disk::honest());
    assert_eq!(without.iter().map(|loss| loss.rule).collect::<Vec<_>>(), [Rule::ImageAcknowledged]);
    assert!(without[0].text.contains(PULLED), "{without:?}");
    let torn = disk();
    torn.empty(&program_of_pulled());
    let torn = losses(&torn);
    assert_eq!(
        torn.iter().map(|loss| (loss.rule, &loss.path)).collect::<Vec<_>>(),
        [(Rule::ImageComplete, &program_of_pulled())]
    );
    assert!(torn[0].text.contains(PULLED), "{torn:?}");
}

#[test]
fn an_image_is_demanded_while_a_deployment_names_it() {
    let kinds = [
        desired("web", 1, put(IMAGE)),
        loaded(IMAGE),
        desired("web", 2, Wish::Delete),
        desired("job", 3, put(PULLED)),
        // A report about an image that no deployment names any more.
        loaded(IMAGE),
        loaded(PULLED),
        desired("web", 4, put(IMAGE)),
        loaded(IMAGE),
        desired("job", 5, Wish::Delete),
    ];
    let events = kinds.into_iter().enumerate().map(|(position, kind)| Event { position, kind }).collect();
    let judge = judge_of(events);
    let demanded: Vec<_> = (0..10)
        .map(|point| judge.timeline.at(point).images.into_keys().collect::<Vec<_>>().join(" "))
        .collect();
    let both = format!("{PULLED} {IMAGE}");
    assert_eq!(demanded, ["", IMAGE, IMAGE, "", "", PULLED, PULLED, &both, &both, IMAGE]);
}
