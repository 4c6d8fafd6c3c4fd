//! A directory that goes away with its owner.

use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU32, Ordering};
use std::{env, fs, io, process};

static COUNT: AtomicU32 = AtomicU32::new(0);

/// A fresh directory, removed with all it holds when dropped.
#[derive(Debug)]
pub struct TempDir(PathBuf);

impl TempDir {
    /// Makes one below the system's temporary directory.
    pub fn new() -> Self {
        loop {
            let name = format!("adapter-test-{}-{}", process::id(), COUNT.fetch_add(1, Ordering::Relaxed));
            let path = env::temp_dir().join(name);
            match fs::create_dir(&path) {
                Ok(()) => return Self(path),
                // Left over from a killed run whose process id has come round again.
                Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {}
                Err(error) => panic!("{}: {error}", path.display()),
            }
        }
    }

    pub fn path(&self) -> &Path {
        &self.0
    }

    /// Writes `content` to the file `name` as a rename, so that a reader sees the old or the new.
    pub fn write(&self, name: &str, content: impl AsRef<[u8]>) -> PathBuf {
        replace(&self.0.join(name), content)
    }
}

impl Drop for TempDir {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.0);
    }
}

/// Replaces a file as kubelet does: a reader never sees half of it.
pub fn replace(path: &Path, content: impl AsRef<[u8]>) -> PathBuf {
    let mut fresh = path.as_os_str().to_owned();
    fresh.push(".fresh");
    fs::write(&fresh, content).expect("a test file is written");
    fs::rename(&fresh, path).expect("a test file is put in place");
    path.to_owned()
}
