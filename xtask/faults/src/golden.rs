//! Compares results of tests with golden files in `test_data/`. `SNAPSHOTS=overwrite` rewrites the files.

use std::path::Path;

use snapbox::data::DataFormat;
use snapbox::{Assert, Data};

#[track_caller]
pub(crate) fn compare(name: &str, actual: String) {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("test_data").join(name);
    let expected = Data::read_from(&path, Some(DataFormat::Text));
    Assert::new().action_env(snapbox::assert::DEFAULT_ACTION_ENV).eq(actual, expected.raw());
}
