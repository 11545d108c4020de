//! Schemas of request bodies. Nothing here is ever constructed: handlers read bodies field by field
//! ([`super::document`]), so that a refusal names the field. A test sends every field of every example and holds
//! the schemas against the fields that handlers really ask for.

#![expect(dead_code, reason = "schemas, not values")]

use std::collections::BTreeMap;

use sandgate_api::{credential::Inject, openapi::PolicyDocument, rest::Role, tunnel::TunnelProtocol};
use serde::Serialize;
use utoipa::ToSchema;

/// Who registers.
#[derive(Serialize, ToSchema)]
#[schema(example = json!({
    "email": "you@example.org", "organization_name": "Example", "first_name": "Ada", "last_name": "Example",
    "use_case": "agents", "invitation": null
}))]
pub(super) struct RegisterBody {
    /// Unique in the installation.
    email: String,
    /// For people. Not needed with an invitation into an organisation.
    #[schema(required = false)]
    organization_name: String,
    #[schema(required = false)]
    first_name: String,
    #[schema(required = false)]
    last_name: String,
    #[schema(required = false)]
    use_case: String,
    /// The token of an invitation: needed where registration is by invitation, and to join an organisation.
    #[schema(required = false)]
    invitation: String,
}

/// A user to be added.
#[derive(Serialize, ToSchema)]
#[schema(example = json!({
    "email": "ada@example.org", "role": "member", "first_name": "Ada", "last_name": "Example"
}))]
pub(super) struct UserBody {
    /// Unique in the installation.
    email: String,
    /// At most the caller's own.
    role: Role,
    #[schema(required = false)]
    first_name: String,
    #[schema(required = false)]
    last_name: String,
    /// Must be the caller's own organisation.
    #[schema(required = false)]
    org_id: String,
}

/// What is to be changed of a user.
#[derive(Serialize, ToSchema)]
#[schema(example = json!({"role": "viewer"}))]
pub(super) struct UserChangeBody {
    /// At most the caller's own.
    role: Role,
    /// Must be the caller's own organisation.
    #[schema(required = false)]
    org_id: String,
}

/// Somebody to be invited.
#[derive(Serialize, ToSchema)]
#[schema(example = json!({"role": "member", "email": "ada@example.org", "expires_in_days": 7}))]
pub(super) struct InvitationBody {
    /// What they are going to be, at most the caller's own.
    role: Role,
    /// Who may use it; none: whoever has it.
    #[schema(required = false)]
    email: String,
    #[schema(required = false, minimum = 1, maximum = 30, default = 7)]
    expires_in_days: u32,
    /// Must be the caller's own organisation.
    #[schema(required = false)]
    org_id: String,
}

/// How a key is rotated. Every field may be left out.
#[derive(Serialize, ToSchema)]
#[schema(example = json!({"grace_seconds": 3600}))]
pub(super) struct RotateBody {
    /// How long the old key works on. It ends at once when this is left out.
    #[schema(required = false, minimum = 0, maximum = 86400, default = 0)]
    grace_seconds: u32,
    /// Must be the caller's own organisation.
    #[schema(required = false)]
    org_id: String,
}

/// A token to be made. Every field may be left out.
#[derive(Serialize, ToSchema)]
#[schema(example = json!({"expires_in": 300, "scopes": ["sandbox:read", "sandbox:execute"]}))]
pub(super) struct TokenBody {
    /// In seconds.
    #[schema(required = false, minimum = 1, maximum = 3600, default = 300)]
    expires_in: u32,
    /// What it may do, at most what the caller may; none: everything the caller may, but for keys and users.
    #[schema(required = false)]
    scopes: Vec<String>,
    /// Must be the caller's own organisation.
    #[schema(required = false)]
    org_id: String,
}

/// A key to be made.
#[derive(Serialize, ToSchema)]
#[schema(example = json!({"name": "ci", "expires_in_days": 30, "scopes": ["sandbox:read", "network:read"]}))]
pub(super) struct KeyBody {
    /// What it is for.
    name: String,
    /// None: it does not expire.
    #[schema(required = false, minimum = 1, maximum = 3650)]
    expires_in_days: u32,
    /// What it may do, at most what the caller may; none: everything the caller may.
    #[schema(required = false)]
    scopes: Vec<String>,
    /// Must be the caller's own organisation.
    #[schema(required = false)]
    org_id: String,
}

/// A sandbox to be made. Every field may be left out.
#[derive(Serialize, ToSchema)]
#[schema(example = json!({
    "cpus": "1", "memory": "512Mi", "disk": "1Gi", "pids": 128, "timeout_seconds": 600,
    "env": {"GREETING": "hello"}, "isolation": "container", "image": "default", "secrets": ["EXAMPLE_TOKEN"],
    "template": "python-basic", "session_key": "thread-7", "idle_timeout_seconds": 300, "metadata": {"owner": "ada"},
    "network": {"mode": "allowlist", "allowed_domains": ["api.example.org"]}
}))]
pub(super) struct SandboxBody {
    /// Processors, for example `2` or `500m`.
    #[schema(required = false)]
    cpus: String,
    /// Memory, for example `2Gi`.
    #[schema(required = false)]
    memory: String,
    /// Size of the writable layer, for example `2Gi`.
    #[schema(required = false)]
    disk: String,
    /// Most processes and threads at once.
    #[schema(required = false)]
    pids: u64,
    /// Its lifetime in seconds.
    #[schema(required = false, minimum = 60, maximum = 86400)]
    timeout_seconds: u64,
    /// Environment variables.
    #[schema(required = false)]
    env: BTreeMap<String, String>,
    /// Only `container` is available here.
    #[schema(required = false)]
    isolation: String,
    /// Only the installation's image is available here.
    #[schema(required = false)]
    image: String,
    /// Which secrets of the organisation it gets.
    #[schema(required = false)]
    secrets: SecretsChoice,
    /// Its own egress policy, one tier among others.
    #[schema(required = false)]
    network: PolicyDocument,
    /// What it is made from: everything that is left out here is the template's, and `env` is added to it.
    #[schema(required = false)]
    template: String,
    /// While a sandbox of this key lives, it is given instead of a new one (`reused`), and lives at least another
    /// `timeout_seconds`; what else is asked for is not looked at then. 1 to 128 characters.
    #[schema(required = false)]
    session_key: String,
    /// It ends when for so long nothing was asked of it and what runs in it did not use 1 % of a processor, nor 4 KiB of
    /// network.
    #[schema(required = false, minimum = 10, maximum = 86400)]
    idle_timeout_seconds: u64,
    /// Notes, at most 32; lists can be filtered by them.
    #[schema(required = false)]
    metadata: BTreeMap<String, String>,
    /// Must be the caller's own organisation.
    #[schema(required = false)]
    org_id: String,
}

/// `all` (the default), `none`, or names.
#[derive(Serialize, ToSchema)]
#[serde(untagged)]
enum SecretsChoice {
    Word(String),
    Names(Vec<String>),
}

/// A sandbox to be made from a template.
#[derive(Serialize, ToSchema)]
#[schema(example = json!({
    "template_id": "python-basic", "override_cpus": "1", "override_memory": "512Mi", "disk": "1Gi", "pids": 128,
    "timeout_seconds": 600, "env": {"GREETING": "hello"}, "isolation": "container", "image": "default",
    "secrets": ["EXAMPLE_TOKEN"], "session_key": "thread-8", "idle_timeout_seconds": 300,
    "metadata": {"owner": "ada"}, "network": {"mode": "allowlist", "allowed_domains": ["api.example.org"]}
}))]
pub(super) struct FromTemplateBody {
    /// See `GET /templates`.
    template_id: String,
    /// Instead of the template's.
    #[schema(required = false)]
    override_cpus: String,
    /// Instead of the template's.
    #[schema(required = false)]
    override_memory: String,
    /// Instead of the template's.
    #[schema(required = false)]
    disk: String,
    /// Instead of the template's.
    #[schema(required = false)]
    pids: u64,
    /// Instead of the template's.
    #[schema(required = false, minimum = 60, maximum = 86400)]
    timeout_seconds: u64,
    /// Beside the template's, and instead of it where a name is the same.
    #[schema(required = false)]
    env: BTreeMap<String, String>,
    /// Only `container` is available here.
    #[schema(required = false)]
    isolation: String,
    /// Only the installation's default image is available here.
    #[schema(required = false)]
    image: String,
    /// Which secrets of the organisation it gets.
    #[schema(required = false)]
    secrets: SecretsChoice,
    /// Instead of the template's.
    #[schema(required = false)]
    network: PolicyDocument,
    /// As in `POST /sandbox/create`.
    #[schema(required = false)]
    session_key: String,
    /// Instead of the template's.
    #[schema(required = false, minimum = 10, maximum = 86400)]
    idle_timeout_seconds: u64,
    /// As in `POST /sandbox/create`.
    #[schema(required = false)]
    metadata: BTreeMap<String, String>,
    /// Must be the caller's own organisation.
    #[schema(required = false)]
    org_id: String,
}

/// A template of the organisation.
#[derive(Serialize, ToSchema)]
#[schema(example = json!({
    "name": "Flask", "description": "Flask and a settings file", "category": "web", "tags": ["python"],
    "config": {
        "cpus": "1", "memory": "512Mi", "disk": "1Gi", "pids": 128, "timeout_seconds": 600,
        "idle_timeout_seconds": 300, "env": {"FLASK_ENV": "production"}, "setup_commands": ["pip install flask"]
    },
    "files": [{"path": "/workspace/settings.py", "content": "DEBUG = False\n"}],
    "network": {"mode": "allowlist", "allowed_domains": ["pypi.org", "files.pythonhosted.org"]}
}))]
pub(super) struct TemplateBody {
    /// For people.
    name: String,
    /// For people.
    #[schema(required = false)]
    description: String,
    /// What lists are filtered by.
    #[schema(required = false, default = "custom")]
    category: String,
    /// At most 20.
    #[schema(required = false)]
    tags: Vec<String>,
    /// What is left out is as without a template.
    #[schema(required = false)]
    config: TemplateConfigBody,
    /// Text files, at most 64 and 1 MiB together, written before the commands are run.
    #[schema(required = false)]
    files: Vec<TemplateFileBody>,
    /// The egress policy of its sandboxes.
    #[schema(required = false)]
    network: PolicyDocument,
    /// Must be the caller's own organisation.
    #[schema(required = false)]
    org_id: String,
}

/// What a sandbox made from a template gets.
#[derive(Serialize, ToSchema)]
struct TemplateConfigBody {
    #[schema(required = false)]
    cpus: String,
    #[schema(required = false)]
    memory: String,
    #[schema(required = false)]
    disk: String,
    #[schema(required = false)]
    pids: u64,
    #[schema(required = false, minimum = 60, maximum = 86400)]
    timeout_seconds: u64,
    #[schema(required = false, minimum = 10, maximum = 86400)]
    idle_timeout_seconds: u64,
    #[schema(required = false)]
    env: BTreeMap<String, String>,
    /// Shell lines, at most 32, run one after the other below `/workspace`; each must end with 0.
    #[schema(required = false)]
    setup_commands: Vec<String>,
}

/// A text file of a template.
#[derive(Serialize, ToSchema)]
struct TemplateFileBody {
    /// Absolute; missing directories are made.
    path: String,
    /// Its text.
    content: String,
}

/// How much longer a sandbox shall live.
#[derive(Serialize, ToSchema)]
#[schema(example = json!({"additional_seconds": 600}))]
pub(super) struct ExtendBody {
    /// Beyond the time at which it would end now.
    #[schema(minimum = 1)]
    additional_seconds: u64,
    /// Must be the caller's own organisation.
    #[schema(required = false)]
    org_id: String,
}

/// A command to be run.
#[derive(Serialize, ToSchema)]
#[schema(example = json!({
    "command": "echo hello", "stream": false, "timeout": 30000, "env": {"GREETING": "hello"},
    "working_dir": "/workspace", "cwd": "/workspace", "track_files": true
}))]
pub(super) struct ExecuteBody {
    /// A line for the shell, or a program and its arguments.
    command: CommandLine,
    /// Answer with server-sent events, each a `StreamEvent`.
    #[schema(required = false, default = false)]
    stream: bool,
    /// In milliseconds; then the command is killed and its exit status is 124.
    #[schema(required = false, minimum = 1, maximum = 86400000)]
    timeout: u64,
    /// Environment variables beside the sandbox's own.
    #[schema(required = false)]
    env: BTreeMap<String, String>,
    /// Absolute.
    #[schema(required = false, default = "/workspace")]
    working_dir: String,
    /// Another name for `working_dir`.
    #[schema(required = false)]
    cwd: String,
    /// Tell what is different below `/workspace` afterwards: `files_changed`, of at most 20,000 entries and 1,000
    /// changes. Costs a look at every entry before and after the command.
    #[schema(required = false, default = false)]
    track_files: bool,
    /// Must be the caller's own organisation.
    #[schema(required = false)]
    org_id: String,
}

/// A process to be started.
#[derive(Serialize, ToSchema)]
#[schema(example = json!({
    "command": "python3 -m http.server 8000", "env": {"GREETING": "hello"}, "working_dir": "/workspace",
    "cwd": "/workspace", "pty": {"rows": 24, "cols": 80}, "background": true
}))]
pub(super) struct ProcessBody {
    /// A line for the shell, or a program and its arguments.
    command: CommandLine,
    /// Environment variables beside the sandbox's own.
    #[schema(required = false)]
    env: BTreeMap<String, String>,
    /// Absolute.
    #[schema(required = false, default = "/workspace")]
    working_dir: String,
    /// Another name for `working_dir`.
    #[schema(required = false)]
    cwd: String,
    /// A terminal instead of pipes: `true`, or its size.
    #[schema(required = false)]
    pty: TerminalChoice,
    /// False: it ends with the last of those who follow its output.
    #[schema(required = false, default = true)]
    background: bool,
    /// Must be the caller's own organisation.
    #[schema(required = false)]
    org_id: String,
}

/// Whether there is a terminal, or its size.
#[derive(Serialize, ToSchema)]
#[serde(untagged)]
enum TerminalChoice {
    Wanted(bool),
    Size(ResizeBody),
}

/// A session to begin.
#[derive(Serialize, ToSchema)]
#[schema(example = json!({
    "language": "python", "env": {"GREETING": "hello"}, "working_dir": "/workspace", "cwd": "/workspace"
}))]
pub(super) struct ReplSessionBody {
    /// `python`, `node` or `bash`.
    #[schema(required = false, default = "python")]
    language: String,
    /// Environment variables beside the sandbox's own.
    #[schema(required = false)]
    env: BTreeMap<String, String>,
    /// Absolute.
    #[schema(required = false, default = "/workspace")]
    working_dir: String,
    /// Another name for `working_dir`.
    #[schema(required = false)]
    cwd: String,
    /// Must be the caller's own organisation.
    #[schema(required = false)]
    org_id: String,
}

/// Code for a session.
#[derive(Serialize, ToSchema)]
#[schema(example = json!({"code": "print(42)", "timeout_ms": 30000}))]
pub(super) struct ReplCodeBody {
    /// At most 1 MiB.
    code: String,
    /// Then the code is interrupted.
    #[schema(required = false, default = 30000, minimum = 1, maximum = 86400000)]
    timeout_ms: u64,
    /// Must be the caller's own organisation.
    #[schema(required = false)]
    org_id: String,
}

/// A terminal's size, in characters.
#[derive(Serialize, ToSchema)]
#[schema(example = json!({"rows": 50, "cols": 132}))]
pub(super) struct ResizeBody {
    #[schema(required = false, default = 24, minimum = 1, maximum = 1000)]
    rows: u16,
    #[schema(required = false, default = 80, minimum = 1, maximum = 1000)]
    cols: u16,
}

/// What a process reads.
#[derive(Serialize, ToSchema)]
#[schema(example = json!({"data": "aGVsbG8K", "encoding": "base64", "close": false}))]
pub(super) struct InputBody {
    /// At most 1 MiB. Only `close` needs none.
    #[schema(required = false)]
    data: String,
    /// `utf8` or `base64`.
    #[schema(required = false, default = "utf8")]
    encoding: String,
    /// The input ends with it.
    #[schema(required = false, default = false)]
    close: bool,
    /// Must be the caller's own organisation.
    #[schema(required = false)]
    org_id: String,
}

/// A signal for a process.
#[derive(Serialize, ToSchema)]
#[schema(example = json!({"signal": "TERM"}))]
pub(super) struct SignalBody {
    /// Its name, with or without `SIG`, or its number.
    signal: SignalName,
    /// Must be the caller's own organisation.
    #[schema(required = false)]
    org_id: String,
}

/// A signal's name or number.
#[derive(Serialize, ToSchema)]
#[serde(untagged)]
enum SignalName {
    Name(String),
    Number(u8),
}

/// A line for the shell, or a program and its arguments.
#[derive(Serialize, ToSchema)]
#[serde(untagged)]
enum CommandLine {
    Line(String),
    Vector(Vec<String>),
}

/// Files to be written: `files`, or one file as `path` and `content`.
#[derive(Serialize, ToSchema)]
#[schema(examples(
    json!({"files": [{"path": "/workspace/main.py", "content": "cHJpbnQoMSkK"}]}),
    json!({"path": "/workspace/main.py", "content": "cHJpbnQoMSkK"})
))]
pub(super) struct FilesBody {
    #[schema(required = false)]
    files: Vec<FileBody>,
    /// Of one file.
    #[schema(required = false)]
    path: String,
    /// Of one file, base64.
    #[schema(required = false)]
    content: String,
    /// Must be the caller's own organisation.
    #[schema(required = false)]
    org_id: String,
}

/// One file.
#[derive(Serialize, ToSchema)]
struct FileBody {
    /// Absolute; missing directories are made.
    path: String,
    /// Base64.
    content: String,
}

/// What to look for.
#[derive(Serialize, ToSchema)]
#[schema(example = json!({"pattern": "**/*.py", "path": "/workspace/src"}))]
pub(super) struct GlobBody {
    /// Of paths relative to the directory: `*`, `?`, `**`, `[a-z]`, `{one,other}`.
    pattern: String,
    /// The directory; `/workspace` when left out.
    #[schema(required = false)]
    path: String,
    /// Must be the caller's own organisation.
    #[schema(required = false)]
    org_id: String,
}

/// What to remove.
#[derive(Serialize, ToSchema)]
#[schema(example = json!({"path": "/workspace/old", "recursive": true}))]
pub(super) struct DeleteBody {
    /// Absolute.
    path: String,
    /// Also a directory with everything in it.
    #[schema(required = false, default = false)]
    recursive: bool,
    /// Must be the caller's own organisation.
    #[schema(required = false)]
    org_id: String,
}

/// A new directory.
#[derive(Serialize, ToSchema)]
#[schema(example = json!({"path": "/workspace/src/deep", "recursive": true}))]
pub(super) struct MakeDirectoryBody {
    /// Absolute.
    path: String,
    /// Also its parents; then one that is there already is no error.
    #[schema(required = false, default = true)]
    recursive: bool,
    /// Must be the caller's own organisation.
    #[schema(required = false)]
    org_id: String,
}

/// From where to where.
#[derive(Serialize, ToSchema)]
#[schema(example = json!({"source": "/workspace/a.txt", "destination": "/workspace/b.txt"}))]
pub(super) struct RelocationBody {
    /// Absolute.
    source: String,
    /// Absolute: the new path itself, not a directory to put it in. Its parents are made.
    destination: String,
    /// Must be the caller's own organisation.
    #[schema(required = false)]
    org_id: String,
}

/// A secret to be stored. Its value is in no answer.
#[derive(Serialize, ToSchema)]
#[schema(example = json!({
    "name": "EXAMPLE_TOKEN", "value": "a value that is never shown again", "scope": "sandbox",
    "egress": {
        "hosts": ["api.example.org"], "ports": [443], "methods": ["GET"], "paths": ["/v1/**"],
        "inject": [{"kind": "bearer"}], "strip_client_auth": true
    }
}))]
pub(super) struct SecretBody {
    /// The environment variable it becomes.
    name: String,
    value: String,
    /// Only `sandbox` is supported by this version.
    #[schema(required = false)]
    scope: String,
    /// Where it may go; left out: a preset by its name, if there is one; `null`: a plain environment variable.
    #[schema(required = false)]
    egress: Option<BindingsBody>,
    /// Must be the caller's own organisation.
    #[schema(required = false)]
    org_id: String,
}

/// What changes of a secret. A field that is left out stays as it is.
#[derive(Serialize, ToSchema)]
#[schema(example = json!({
    "name": "EXAMPLE_TOKEN", "value": "a new value", "scope": "sandbox",
    "egress": [{"hosts": ["api.example.org"], "inject": [{"kind": "header", "header": "x-api-key", "format": "{value}"}]}]
}))]
pub(super) struct SecretChangeBody {
    /// Its present name: a secret cannot be renamed.
    #[schema(required = false)]
    name: String,
    #[schema(required = false)]
    value: String,
    /// Only `sandbox` is supported by this version.
    #[schema(required = false)]
    scope: String,
    /// Where it may go; `null`: it becomes a plain environment variable.
    #[schema(required = false)]
    egress: Option<BindingsBody>,
    /// Must be the caller's own organisation.
    #[schema(required = false)]
    org_id: String,
}

/// One binding, or several.
#[derive(Serialize, ToSchema)]
#[serde(untagged)]
enum BindingsBody {
    One(BindingBody),
    Several(Vec<BindingBody>),
}

/// Where a secret may go, and how it gets into requests.
#[derive(Serialize, ToSchema)]
struct BindingBody {
    /// Exact, or `*.` and a suffix.
    hosts: Vec<String>,
    #[schema(required = false, default = json!([443]))]
    ports: Vec<u16>,
    /// None: any.
    #[schema(required = false)]
    methods: Vec<String>,
    /// None: any.
    #[schema(required = false)]
    paths: Vec<String>,
    /// How it gets into requests; at least one.
    inject: Vec<Inject>,
    /// Take other credentials out of requests to these hosts.
    #[schema(required = false, default = true)]
    strip_client_auth: bool,
}

/// Secrets for a running sandbox: names, or all.
#[derive(Serialize, ToSchema)]
#[schema(example = json!({"secrets": ["EXAMPLE_TOKEN"], "all": false}))]
pub(super) struct InjectBody {
    #[schema(required = false)]
    secrets: Vec<String>,
    #[schema(required = false, default = false)]
    all: bool,
    /// Must be the caller's own organisation.
    #[schema(required = false)]
    org_id: String,
}

/// A tunnel to be opened.
#[derive(Serialize, ToSchema)]
#[schema(examples(
    json!({"port": 3000, "protocol": "http", "expires_in": 3600, "public": false}),
    json!({"port": 3000, "expiresIn": 3600})
))]
pub(super) struct TunnelBody {
    /// The TCP port inside; never that of the sandbox's agent.
    #[schema(minimum = 1, maximum = 65535)]
    port: u16,
    /// What is spoken on it: `http` (HTTP/1.1, WebSocket), `h2c` (HTTP/2 with prior knowledge, gRPC) or `tcp`.
    #[schema(required = false, default = "http")]
    protocol: TunnelProtocol,
    /// Seconds until it ends by itself; it ends with its sandbox in any case.
    #[schema(required = false, default = 3600, minimum = 1, maximum = 604800)]
    expires_in: u32,
    /// The same, as some clients write it.
    #[schema(required = false, rename = "expiresIn", minimum = 1, maximum = 604800)]
    #[serde(rename = "expiresIn")]
    expires_in_camel: u32,
    /// Whoever reaches it may use it, without a token.
    #[schema(required = false, default = false)]
    public: bool,
    /// Must be the caller's own organisation.
    #[schema(required = false)]
    org_id: String,
}

/// Which records are looked at.
#[derive(Serialize, ToSchema)]
#[schema(example = json!({ "since": "2026-01-30T10:00:00Z", "until": 1_769_800_000 }))]
pub(super) struct SpanBody {
    /// Not before: RFC 3339, or seconds since 1970.
    #[schema(required = false)]
    since: String,
    /// Before.
    #[schema(required = false)]
    until: String,
}

/// The policy to try on records.
#[derive(Serialize, ToSchema)]
#[schema(example = json!({
    "network": {"mode": "allowlist", "allowed_domains": ["api.example.org"]},
    "since": "2026-01-30T10:00:00Z", "until": "2026-01-30T12:00:00Z"
}))]
pub(super) struct SimulateBody {
    /// Instead of the sandbox's own policy.
    network: PolicyDocument,
    /// Not before: RFC 3339, or seconds since 1970.
    #[schema(required = false)]
    since: String,
    /// Before.
    #[schema(required = false)]
    until: String,
}
