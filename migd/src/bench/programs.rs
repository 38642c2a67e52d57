//! The servers: the same programs with the same arguments on every stack.

use std::path::Path;

use anyhow::Context;

use crate::lab::require;

/// A server that is measured.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Program {
    /// `migd bench peer`: streams and echoes.
    Peer,
    /// `migd bench resident`: memory, of which some is written each second, and an echo.
    Resident { resident_mb: u32, dirty_mb_s: u32 },
    /// The distribution's redis-server, nearly empty, without persistence.
    Redis,
    /// The distribution's nginx, one process, a fixed answer of some bytes.
    Nginx,
}

impl Program {
    /// The port on which it listens.
    pub(super) fn port(self) -> u16 {
        match self {
            Program::Peer | Program::Resident { .. } => 5301,
            Program::Redis => 6379,
            Program::Nginx => 8080,
        }
    }

    /// Its command line. What it needs in files is written below `files`.
    ///
    /// # Errors
    /// When it isn't installed or the files can't be written.
    pub(super) fn argv(self, files: &Path) -> anyhow::Result<Vec<String>> {
        let port = self.port().to_string();
        let words = |words: &[&str]| words.iter().map(|&word| word.to_owned()).collect();
        Ok(match self {
            Program::Peer => {
                let own = std::env::current_exe().context("the path of this program")?.display().to_string();
                words(&[&own, "bench", "peer", "--port", &port])
            }
            Program::Resident { resident_mb, dirty_mb_s } => {
                let own = std::env::current_exe().context("the path of this program")?.display().to_string();
                let (resident_mb, dirty_mb_s) = (resident_mb.to_string(), dirty_mb_s.to_string());
                let memory = ["--resident-mb", &resident_mb, "--dirty-mb-s", &dirty_mb_s];
                words(&[&[own.as_str(), "bench", "resident", "--port", &port], &memory[..]].concat())
            }
            Program::Redis => {
                require("redis-server", "redis-server")?;
                words(&["redis-server", "--port", &port, "--bind", "0.0.0.0", "--protected-mode", "no", "--save", ""])
            }
            Program::Nginx => {
                require("nginx", "nginx-light")?;
                let configuration = nginx_configuration(files, self.port())?;
                words(&["nginx", "-c", &configuration, "-g", "daemon off; master_process off;"])
            }
        })
    }
}

/// An nginx that keeps its files in `files` and answers every request with three bytes; returns the file's path.
fn nginx_configuration(files: &Path, port: u16) -> anyhow::Result<String> {
    let root = files.display().to_string();
    let temporary = ["client_body", "proxy", "fastcgi", "uwsgi", "scgi"]
        .map(|kind| format!("    {kind}_temp_path {root}/nginx-{kind};\n"))
        .concat();
    let text = format!(
        "user root;\npid {root}/nginx.pid;\nerror_log /dev/null;\nevents {{ worker_connections 1024; }}\nhttp {{\n    \
         access_log off;\n{temporary}    server {{ listen {port} backlog=4096; location / {{ return 200 \"ok\\n\"; }} \
         }}\n}}\n"
    );
    let path = files.join("nginx.conf");
    std::fs::write(&path, text).with_context(|| format!("can't write {}", path.display()))?;
    Ok(path.display().to_string())
}
