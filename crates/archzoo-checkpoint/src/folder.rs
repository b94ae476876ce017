use std::ffi::{OsStr, OsString};
use std::fs::{self, File, OpenOptions};
use std::hash::{BuildHasher, Hasher, RandomState};
use std::io;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use rustix::fs::{Access, AtFlags, CWD, FlockOperation, accessat, flock};
use rustix::io::Errno;

use crate::writer::sync;
use crate::{Error, INDEX_FILE, MANIFEST_FILE, Result};

/// Builds a folder beside its final place and puts it there in one step.
///
/// Until [`commit`](Self::commit) the final folder is what it was, whatever happens to this process; dropped
/// without a commit, nothing remains. One writer at a time for each final folder, over all processes.
#[derive(Debug)]
pub struct FolderWriter {
    target: PathBuf,
    temporary: PathBuf,
    /// Owner: a forked child holds a copy that must not clean up.
    process: u32,
    lock: Lock,
}

impl FolderWriter {
    /// Locks `target`, removes what writers of it left that died, and makes the temporary folder.
    pub fn new(target: &Path) -> Result<Self> {
        // The folder behind a link is replaced, not the link.
        let target = match fs::canonicalize(target) {
            Ok(found) if !found.is_dir() => {
                return Err(Error::new(&found, "expected a folder, found something else"));
            }
            Ok(found) => {
                accessat(CWD, &found, Access::WRITE_OK, AtFlags::EACCESS)
                    .map_err(|e| Error::io(&found, "write to")(e.into()))?;
                found
            }
            Err(error) if error.kind() == io::ErrorKind::NotFound && !target.is_symlink() => {
                std::path::absolute(target).map_err(Error::io(target, "find"))?
            }
            Err(error) => return Err(Error::io(target, "open")(error)),
        };
        let (Some(parent), Some(_)) = (target.parent(), target.file_name()) else {
            return Err(Error::new(&target, "expected a folder with a name"));
        };
        fs::create_dir_all(parent).map_err(Error::io(parent, "create"))?;
        let lock = Lock::take(sibling(&target, ".lock"), &target)?;
        recover(&target)?;
        let temporary = sibling(&target, &format!(".tmp-{}-{:016x}", std::process::id(), random()));
        fs::create_dir(&temporary).map_err(Error::io(&temporary, "create"))?;
        Ok(Self { target, temporary, process: std::process::id(), lock })
    }

    /// The temporary folder.
    pub fn path(&self) -> &Path {
        &self.temporary
    }

    /// Puts the temporary folder in the final place. Files of an older folder that the new one lacks are
    /// carried over, except its weights and those at the top that are `obsolete`.
    pub fn commit(self, obsolete: &[String]) -> Result<()> {
        sync_tree(&self.temporary)?;
        if self.target.exists() {
            let left_out =
                |name: &OsStr| is_weights(name) || obsolete.iter().any(|other| name == other.as_str());
            carry_over(&self.target, &self.temporary, &left_out)?;
            let permissions =
                fs::metadata(&self.target).map_err(Error::io(&self.target, "read"))?.permissions();
            fs::set_permissions(&self.temporary, permissions).map_err(Error::io(&self.temporary, "write"))?;
        }
        sync(&self.temporary)?;
        publish(&self.temporary, &self.target)?;
        sync(self.target.parent().unwrap_or(Path::new("/")))
        // Dropping removes what now stands in the temporary place: the older folder.
    }

    /// Removes the temporary folder.
    pub fn abort(self) {}
}

impl Drop for FolderWriter {
    fn drop(&mut self) {
        if self.process == std::process::id() {
            // What cannot be removed now is removed by the next writer.
            let _ = fs::remove_dir_all(&self.temporary);
            self.lock.release();
        }
    }
}

/// `.{name}{suffix}` beside `target`.
fn sibling(target: &Path, suffix: &str) -> PathBuf {
    let mut name = OsString::from(".");
    name.push(target.file_name().unwrap_or_default());
    name.push(suffix);
    target.with_file_name(name)
}

fn random() -> u64 {
    RandomState::new().build_hasher().finish()
}

/// An exclusive lock on a file, which is removed with it.
#[derive(Debug)]
struct Lock {
    path: PathBuf,
    file: File,
}

impl Lock {
    fn take(path: PathBuf, target: &Path) -> Result<Self> {
        loop {
            let file = OpenOptions::new()
                .write(true)
                .create(true)
                .truncate(false)
                .open(&path)
                .map_err(Error::io(&path, "create"))?;
            match flock(&file, FlockOperation::NonBlockingLockExclusive) {
                Ok(()) => {}
                Err(Errno::WOULDBLOCK) => {
                    return Err(Error::new(target, "another writer is saving to this folder"));
                }
                Err(error) => return Err(Error::io(&path, "lock")(error.into())),
            }
            // The last holder may have removed this file between the two steps.
            let own = file.metadata().map_err(Error::io(&path, "lock"))?;
            if fs::metadata(&path).is_ok_and(|found| (found.dev(), found.ino()) == (own.dev(), own.ino())) {
                return Ok(Self { path, file });
            }
        }
    }

    fn release(&self) {
        let _ = fs::remove_file(&self.path);
        // Explicitly: a forked child may hold a copy of the descriptor.
        let _ = flock(&self.file, FlockOperation::Unlock);
    }
}

/// Under the lock: finishes or removes what dead writers of `target` left beside it.
fn recover(target: &Path) -> Result<()> {
    let parent = target.parent().unwrap_or(Path::new("/"));
    let (temporary, old) = (sibling(target, ".tmp-"), sibling(target, ".old-"));
    for entry in fs::read_dir(parent).map_err(Error::io(parent, "list"))? {
        let path = entry.map_err(Error::io(parent, "list"))?.path();
        if after(&path, &old).is_some_and(is_random) {
            // Left by `swap_in_two_steps`.
            if target.exists() {
                let _ = fs::remove_dir_all(&path);
            } else {
                fs::rename(&path, target).map_err(Error::io(&path, "restore"))?;
            }
        } else if let Some((process, number)) = after(&path, &temporary).and_then(|rest| rest.split_once('-'))
            && is_random(number)
            && process.parse().is_ok_and(is_gone)
        {
            let _ = fs::remove_dir_all(&path);
        }
    }
    Ok(())
}

/// What follows in the file name of `path` after that of `prefix`.
fn after<'a>(path: &'a Path, prefix: &Path) -> Option<&'a str> {
    let rest = path.file_name()?.as_bytes().strip_prefix(prefix.file_name()?.as_bytes())?;
    std::str::from_utf8(rest).ok()
}

/// Whether this is how [`random`] is written in a name.
fn is_random(text: &str) -> bool {
    text.len() == 16 && text.bytes().all(|byte| byte.is_ascii_hexdigit())
}

/// Whether that process has ended. Our own holds the lock, so what carries our id was left by an older one.
fn is_gone(process: i32) -> bool {
    process as u32 == std::process::id()
        || rustix::process::Pid::from_raw(process)
            .is_some_and(|id| rustix::process::test_kill_process(id) == Err(Errno::SRCH))
}

/// Links into `new` what `old` has and `new` lacks, except what is `left_out` at the top.
fn carry_over(old: &Path, new: &Path, left_out: &dyn Fn(&OsStr) -> bool) -> Result<()> {
    for entry in fs::read_dir(old).map_err(Error::io(old, "list"))? {
        let entry = entry.map_err(Error::io(old, "list"))?;
        let (from, to) = (entry.path(), new.join(entry.file_name()));
        if left_out(&entry.file_name()) {
            continue;
        }
        let is_folder = entry.file_type().map_err(Error::io(&from, "read"))?.is_dir();
        match fs::symlink_metadata(&to) {
            Ok(found) if is_folder && found.is_dir() => carry_over(&from, &to, &|_| false)?,
            Ok(_) => {}
            Err(_) if is_folder => {
                fs::create_dir(&to).map_err(Error::io(&to, "create"))?;
                carry_over(&from, &to, &|_| false)?;
                let permissions = entry.metadata().map_err(Error::io(&from, "read"))?.permissions();
                fs::set_permissions(&to, permissions).map_err(Error::io(&to, "write"))?;
                sync(&to)?;
            }
            Err(_) => link_or_copy(&from, &to).map_err(Error::io(&from, "carry over"))?,
        }
    }
    Ok(())
}

fn is_weights(name: &OsStr) -> bool {
    let name = name.to_string_lossy();
    name == INDEX_FILE
        || name == MANIFEST_FILE
        || name.contains(".tmp-")
        || (name.starts_with("model") && name.ends_with(".safetensors"))
}

fn link_or_copy(from: &Path, to: &Path) -> io::Result<()> {
    if fs::hard_link(from, to).is_ok() {
        return Ok(());
    }
    if from.is_symlink() {
        return std::os::unix::fs::symlink(fs::read_link(from)?, to);
    }
    fs::copy(from, to)?;
    File::open(to)?.sync_all()
}

fn sync_tree(folder: &Path) -> Result<()> {
    for entry in fs::read_dir(folder).map_err(Error::io(folder, "list"))? {
        let entry = entry.map_err(Error::io(folder, "list"))?;
        let (path, kind) = (entry.path(), entry.file_type());
        let kind = kind.map_err(Error::io(&path, "read"))?;
        if kind.is_dir() {
            sync_tree(&path)?;
        } else if kind.is_file() {
            sync(&path)?;
        }
    }
    sync(folder)
}

/// Puts `new` in the place of `target`. An older folder ends in the place of `new`.
fn publish(new: &Path, target: &Path) -> Result<()> {
    if !target.exists() {
        return fs::rename(new, target).map_err(Error::io(target, "create"));
    }
    match exchange(new, target) {
        Ok(()) => Ok(()),
        Err(Errno::INVAL | Errno::NOSYS | Errno::NOTSUP) => swap_in_two_steps(new, target),
        Err(error) => Err(Error::io(target, "replace")(error.into())),
    }
}

#[cfg(any(target_os = "linux", target_os = "android", target_vendor = "apple"))]
fn exchange(new: &Path, target: &Path) -> rustix::io::Result<()> {
    use rustix::fs::{RenameFlags, renameat_with};
    renameat_with(CWD, new, CWD, target, RenameFlags::EXCHANGE)
}

#[cfg(not(any(target_os = "linux", target_os = "android", target_vendor = "apple")))]
fn exchange(_: &Path, _: &Path) -> rustix::io::Result<()> {
    Err(Errno::NOSYS)
}

/// Where a file system cannot exchange two folders. A process that dies between the steps leaves the older
/// folder beside its place, and the next writer restores it.
fn swap_in_two_steps(new: &Path, target: &Path) -> Result<()> {
    let old = sibling(target, &format!(".old-{:016x}", random()));
    fs::rename(target, &old).map_err(Error::io(target, "replace"))?;
    if let Err(error) = fs::rename(new, target) {
        fs::rename(&old, target).map_err(Error::io(&old, "restore"))?;
        return Err(Error::io(target, "replace")(error));
    }
    let _ = fs::remove_dir_all(&old);
    Ok(())
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    fn folder(parent: &Path, name: &str, files: &[(&str, &str)]) -> PathBuf {
        let folder = parent.join(name);
        for (name, content) in files {
            let file = folder.join(name);
            fs::create_dir_all(file.parent().unwrap()).unwrap();
            fs::write(file, content).unwrap();
        }
        folder
    }

    fn names(folder: &Path) -> Vec<String> {
        let mut names: Vec<String> = fs::read_dir(folder)
            .unwrap()
            .map(|entry| entry.unwrap().file_name().into_string().unwrap())
            .collect();
        names.sort();
        names
    }

    #[test]
    fn two_steps_replace_and_leave_nothing_behind() {
        let root = tempfile::tempdir().unwrap();
        let target = folder(root.path(), "out", &[("a", "old")]);
        let new = folder(root.path(), "new", &[("a", "new")]);
        swap_in_two_steps(&new, &target).unwrap();
        assert_eq!(fs::read_to_string(target.join("a")).unwrap(), "new");
        assert_eq!(names(root.path()), ["out"]);
    }

    #[test]
    fn two_steps_restore_the_old_folder_when_the_second_fails() {
        let root = tempfile::tempdir().unwrap();
        let target = folder(root.path(), "out", &[("a", "old")]);
        let error = swap_in_two_steps(&root.path().join("missing"), &target).unwrap_err();
        assert_eq!(error.file, target);
        assert_eq!(fs::read_to_string(target.join("a")).unwrap(), "old");
        assert_eq!(names(root.path()), ["out"]);
    }

    #[test]
    fn the_next_writer_restores_what_a_death_between_the_steps_moved_away() {
        let root = tempfile::tempdir().unwrap();
        folder(root.path(), ".out.old-0123456789abcdef", &[("a", "old")]);
        // Not ours: another folder's temporary that only looks alike, and a live process's.
        folder(root.path(), ".out.old-x.tmp-1-0123456789abcdef", &[("a", "")]);
        folder(root.path(), ".out.tmp-1-0123456789abcdef", &[("a", "")]);
        folder(root.path(), ".out.tmp-2147483646-0123456789abcdef", &[("a", "")]);
        let writer = FolderWriter::new(&root.path().join("out")).unwrap();
        assert_eq!(fs::read_to_string(root.path().join("out/a")).unwrap(), "old");
        writer.abort();
        assert_eq!(
            names(root.path()),
            [".out.old-x.tmp-1-0123456789abcdef", ".out.tmp-1-0123456789abcdef", "out"]
        );
    }

    #[test]
    fn carries_over_all_but_the_weights() {
        let root = tempfile::tempdir().unwrap();
        let target = folder(
            root.path(),
            "out",
            &[
                ("model-00001-of-00002.safetensors", "old"),
                (INDEX_FILE, "old"),
                ("x.tmp-1", "old"),
                ("config.json", "old"),
                ("tokenizer.json", "old"),
                ("other.json", "old"),
                ("extra/model.safetensors", "old"),
                ("extra/config.json", "old"),
                ("extra/tokenizer.json", "old"),
            ],
        );
        std::os::unix::fs::symlink("nowhere", target.join("link")).unwrap();
        let writer = FolderWriter::new(&target).unwrap();
        folder(
            writer.path(),
            "",
            &[("model.safetensors", "new"), ("config.json", "new"), ("extra/config.json", "new")],
        );
        writer.commit(&["tokenizer.json".to_owned(), "absent".to_owned()]).unwrap();
        assert_eq!(names(&target), ["config.json", "extra", "link", "model.safetensors", "other.json"]);
        assert_eq!(names(&target.join("extra")), ["config.json", "model.safetensors", "tokenizer.json"]);
        assert_eq!(fs::read_to_string(target.join("extra/config.json")).unwrap(), "new");
        assert_eq!(fs::read_to_string(target.join("extra/model.safetensors")).unwrap(), "old");
        assert_eq!(fs::read_to_string(target.join("config.json")).unwrap(), "new");
        assert_eq!(names(root.path()), ["out"]);
    }

    #[test]
    fn a_second_writer_is_refused_until_the_first_ends() {
        let root = tempfile::tempdir().unwrap();
        let target = root.path().join("deep/out");
        let first = FolderWriter::new(&target).unwrap();
        let error = FolderWriter::new(&target).unwrap_err();
        assert_eq!(error.file, target);
        drop(first);
        FolderWriter::new(&target).unwrap().commit(&[]).unwrap();
        assert_eq!(names(root.path().join("deep").as_path()), ["out"]);
    }

    #[test]
    fn a_link_to_a_folder_stays_a_link() {
        let root = tempfile::tempdir().unwrap();
        let target = folder(root.path(), "real", &[("a", "old")]);
        std::os::unix::fs::symlink("real", root.path().join("out")).unwrap();
        std::os::unix::fs::symlink("nowhere", root.path().join("dangling")).unwrap();
        let writer = FolderWriter::new(&root.path().join("out")).unwrap();
        fs::write(writer.path().join("b"), "new").unwrap();
        writer.commit(&[]).unwrap();
        assert_eq!(names(&target), ["a", "b"]);
        assert!(root.path().join("out").is_symlink());
        assert!(FolderWriter::new(&root.path().join("dangling")).is_err());
        assert!(FolderWriter::new(&target.join("a")).unwrap_err().to_string().contains("expected a folder"));
    }
}
