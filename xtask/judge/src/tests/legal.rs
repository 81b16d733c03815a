//! Disks that a power cut may leave, and the points at which they are illegal.

use super::*;

/// A change of the honest disk that a power cut may leave at the point.
type Legal = (usize, fn(&Disk));

const LEGAL: &[Legal] = &[
    // Nothing is installed yet, and the installation was interrupted at its beginning.
    (0, |disk| fs::remove_dir_all(&disk.files.0).unwrap()),
    (5, |disk| {
        fs::remove_dir_all(&disk.files.0).unwrap();
        disk.write_empty(&executable_path(1));
        disk.write_empty("/var/lib/iot-agent/.config/containers/storage.conf");
    }),
    // The upgrade has begun.
    (25, |disk| {
        disk.before_any_deployment();
        disk.install(1);
    }),
    (25, Disk::before_any_deployment),
    (30, Disk::before_any_deployment),
    // Revision 8 was sent, and revision 6 was acknowledged.
    (77, |disk| {
        disk.write(
            STATE,
            state(6, &[("web", 5, Wish::Put(document(1))), ("job", 6, Wish::Put(document(1)))]),
        );
        disk.write(&starts("web"), "3\n");
    }),
    (77, |disk| {
        disk.write(
            STATE,
            state(7, &[("web", 7, Wish::Put(document(2))), ("job", 6, Wish::Put(document(1)))]),
        );
    }),
    // The deletion was carried out and forgotten.
    (END, |disk| disk.write(STATE, state(8, &[("web", 7, Wish::Put(document(2)))]))),
    // The Purge was sent.
    (END + 1, |disk| {
        disk.write(STATE, state(9, &[]));
        fs::remove_dir_all(disk.files.path(&format!("{STORAGE}/volumes"))).unwrap();
        disk.write(&format!("{STORAGE}/overlay-images/images.json"), "[]");
    }),
    // A download of the image runs, and its layer is torn.
    (55, |disk| {
        disk.record("fetching", IMAGE, &format!("{IMAGE}\n"));
        disk.empty(&program());
        disk.write(
            STATE,
            state(6, &[("web", 5, Wish::Put(document(1))), ("job", 6, Wish::Put(document(1)))]),
        );
    }),
    (END, |disk| disk.write(&format!("{STORAGE}/overlay-containers/volatile-containers.json"), "[{")),
];

#[test]
fn what_a_power_cut_may_leave_is_no_loss() {
    for (number, (point, change)) in LEGAL.iter().enumerate() {
        let disk = Disk::honest();
        change(&disk);
        assert_eq!(disk.judged(*point).losses, [], "change {number}");
    }
}

/// The same disks at a point at which they are illegal.
#[test]
fn a_disk_is_judged_by_its_point() {
    for (point, rules) in [
        (99, &[][..]),
        (90, &[]),
        (75, &[Rule::StateNotAhead]),
        (40, &[Rule::StateNotAhead]),
        (20, &[Rule::StateNotAhead, Rule::Executable]),
        (0, &[Rule::StateNotAhead, Rule::Executable]),
    ] {
        let losses = Disk::honest().judged(point).losses;
        assert_eq!(losses.iter().map(|loss| loss.rule).collect::<Vec<_>>(), rules, "{point}: {losses:?}");
    }
    let torn = Disk::honest();
    torn.before_any_deployment();
    torn.empty("/etc/systemd/system/iot-agent.service");
    torn.install(1);
    for point in [5, 15] {
        let losses = torn.judged(point).losses;
        assert!(matches!(losses.as_slice(), [loss] if loss.text.contains("is empty")), "{point}: {losses:?}");
    }
}
