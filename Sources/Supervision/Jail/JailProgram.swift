import CLinux
import ControlProtocol
import Glibc
import HostSystem
import Sandbox

/// `martlet-jail`: starts one program of somebody else's behind walls, stays beside it, and ends as it ends.
package enum JailProgram {
  struct Options {
    var profile: String?
    var learns = false
    var isHardened = false
    var defines: [String: String] = [:]
    var limits: ResourceLimits?
    var controlGroup: String?
    var words: [String] = []
  }

  /// 125: the jail itself; 126, 127: the program cannot be run, does not exist; otherwise what the program gave, 128 + N for signal N.
  package static let ownFailure: Int32 = 125

  package static let help = """
    usage: martlet jail --profile FILE [--define NAME=VALUE ...] [--limits KEY=VALUE,...] [--cgroup PATH] [--hardened]
                        -- PROGRAM [ARGUMENT ...]
           martlet jail --profile FILE --learn [--define NAME=VALUE ...] -- PROGRAM [ARGUMENT ...]

    Runs somebody else's back end behind the walls that Martlet's own processes have: a user or user namespace of its own,
    a root that holds nothing but what the profile shows, no other process, no network, no capability, Landlock, and only the
    system calls of the profile; any other ends it. Signals and the exit code pass through; the program ends with the jail.

      --profile FILE                what the program may see, keep and do (protocol/jail.md)
      --define NAME=VALUE           what {NAME} in the profile stands for, usually a path; may stand often
      --limits KEY=VALUE,...        what it may use, kept by the kernel in a control group (protocol/limits.md), with the keys of devices:
                                    cpu-limit=N%, cpu-weight=N, memory-limit=SIZE, pids-limit=N, io-weight=N, io-read-limit=SIZE and
                                    io-write-limit=SIZE (of the disks below what the profile shows, run places aside)
      --cgroup PATH                 make that group below this one; else in ours, if it is ours alone
      --learn                       run the program once without walls, watch it, and add to FILE what it needed;
                                    paths given by --define are written as {NAME}
      --hardened                    refuse to start where the host lacks a part of the walls

    Exit codes:
      125                           the jail could not be built, or the command line is wrong
      126, 127                      the program cannot be run, there is no such program
      128 plus N                    the program was ended by signal N (159: a system call outside its list)
      any other                     the program's own

    """

  package static func main(_ arguments: [String]) -> Int32 {
    Log.setSpeaker("martlet jail")
    if arguments.contains("--help") || arguments.contains("-h"), arguments.first != "--" {
      let end = arguments.firstIndex(of: "--") ?? arguments.count
      if arguments[..<end].contains(where: { $0 == "--help" || $0 == "-h" }) {
        // Borrowed for the call, never closed.
        let output = OwnedFD(owning: 1)
        try? output.writeAll(Array(help.utf8))
        _ = output.release()
        return 0
      }
    }
    guard let options = parse(arguments) else { return ownFailure }
    guard let path = options.profile else { return refuse("Option --profile is missing; write for example --profile qsd.jail") }
    guard !options.words.isEmpty else { return refuse("No program is named; write it behind --, with its arguments") }
    do throws(JailError) {
      if options.learns { return try JailLearner.run(profile: path, defines: options.defines, words: options.words) }
      return try run(options, try load(path))
    } catch {
      Log.error(error.message)
      return error.exitCode
    }
  }

  private static func refuse(_ sentence: String) -> Int32 {
    Log.error(sentence)
    return ownFailure
  }

  private static func parse(_ arguments: [String]) -> Options? {
    var options = Options()
    var seen: Set<String> = []
    var index = 0
    let known = ["profile", "define", "limits", "cgroup", "learn", "hardened", "help"]
    while index < arguments.count {
      let argument = arguments[index]
      index += 1
      if argument == "--" {
        options.words = Array(arguments[index...])
        return options
      }
      guard argument.hasPrefix("--") else {
        Log.error("Argument '\(argument)' belongs to no option; the program stands behind --")
        return nil
      }
      let parts = argument.dropFirst(2).split(separator: "=", maxSplits: 1, omittingEmptySubsequences: false).map(String.init)
      let name = parts[0]
      guard known.contains(name) else {
        let near = EditDistance.nearest(to: name, in: known)
        Log.error("Unknown option --\(name)\(near.map { "; did you mean --\($0)?" } ?? "; martlet jail --help lists the options")")
        return nil
      }
      var value = parts.count > 1 ? parts[1] : nil
      if name == "learn" || name == "hardened" {
        if let value {
          Log.error("Option --\(name) takes no value; leave out '\(value)'")
          return nil
        }
        if name == "learn" { options.learns = true } else { options.isHardened = true }
        continue
      }
      if value == nil, index < arguments.count, arguments[index] != "--" {
        value = arguments[index]
        index += 1
      }
      guard let value, !value.isEmpty else {
        let example = examples[name].map { "; write for example --\(name) \($0)" } ?? ""
        Log.error("Option --\(name) wants a value\(example)")
        return nil
      }
      if name != "define", !seen.insert(name).inserted {
        Log.error("Option --\(name) is given twice; leave one out")
        return nil
      }
      switch name {
      case "profile": options.profile = value
      case "cgroup": options.controlGroup = value
      case "limits":
        do throws(ConfigurationError) { options.limits = try ResourceLimits(option: name, value) } catch {
          Log.error(error.message)
          return nil
        }
      default:
        let pair = value.split(separator: "=", maxSplits: 1, omittingEmptySubsequences: false).map(String.init)
        guard pair.count == 2, VMConfiguration.isName(pair[0]), options.defines.updateValue(pair[1], forKey: pair[0]) == nil else {
          Log.error("Value '\(value)' does not fit --define; it wants NAME=VALUE, each name once")
          return nil
        }
      }
    }
    return options
  }

  private static let examples = [
    "define": "image=/srv/disk.img", "profile": "qsd.jail", "limits": "cpu-limit=50%,memory-limit=1G", "cgroup": "/services/qsd",
  ]

  package static func load(_ path: String) throws(JailError) -> JailProfile {
    do {
      let fd = try OwnedFD.openNamed(path, O_RDONLY | O_NONBLOCK | O_NOCTTY)
      guard try fd.status().kind == .regular else { throw SystemError("read", .invalid) }
      let bytes = try fd.readToEnd(limit: JailProfile.longestText)
      return try JailProfile(String(decoding: bytes, as: UTF8.self), file: path)
    } catch let error as SystemError {
      throw .profile(path: path, error.errno)
    } catch let error as JailError {
      throw error
    } catch { throw .profile(path: path, .inputOutput) }
  }

  private static let passedOn: [CInt] = [SIGTERM, SIGINT, SIGHUP, SIGQUIT, SIGUSR1, SIGUSR2, SIGWINCH, SIGCONT, SIGALRM]

  private static func run(_ options: Options, _ profile: JailProfile) throws(JailError) -> Int32 {
    var identities: Identities
    do throws(SupervisionError) { identities = try Identities(requested: nil) } catch { throw .host(error.message ?? "No uids to be had") }
    let identity = identities.next()
    let host = HostWalls.probe(identity: identity)
    if options.isHardened, !host.lacks.isEmpty {
      throw .host("This host cannot build all walls, and --hardened wants them: \(host.lacks.joined(separator: ". "))")
    }
    let path = unsafe getenv("PATH").map { unsafe String(cString: $0) }
    var plan = try JailPlan(profile, words: options.words, defines: options.defines, identity: identity, host: host, searchPath: path)
    let groups = try makeGroups(options)
    defer { groups?.remove() }
    let group = try openGroup(groups, options.limits ?? ResourceLimits(), plan)
    plan.launch.group = group?.number
    for warning in plan.warnings { Log.warning(warning) }
    let log = KernelLog()
    let signals: OwnedFD
    do { signals = try Signals.descriptor(for: passedOn) } catch { throw .host(error.description) }
    let child = try plan.start()
    let begin = MonotonicTime.now
    group?.close()
    // From here on the program lives and dies with us. Nothing of it can be attached to us.
    do throws(SandboxError) { try ProcessWalls.raise(title: nil) } catch { throw .host(error.message) }
    guard let end = watch(child, signals) else { throw .host("The program cannot be watched") }
    switch child.poll() {
    case .failed(let stage, let errno): throw .step(stage, errno, place: nil)
    case .failedAt(let stage, let errno, let place): throw .step(stage, errno, place: plan.walls.placeName(place))
    case .executed, .pending: break
    }
    switch end {
    case .exited(let code):
      if code != 0, MonotonicTime.now.since(begin) < Self.startTime {
        Log.warning("\(plan.program) \(end) soon after its start; \(hidingRemedy)")
      }
      return code
    case .killed(let signal):
      if signal == SIGSYS { Log.error(violation(plan.program, child.process.processID, log)) }
      if signal == SIGKILL, groups?.hasExceededMemory(groupName) == true {
        Log.error("\(plan.program) was killed: it wanted more memory than its memory-limit; raise it")
      }
      return 128 + signal
    }
  }

  /// Who ends so soon with an error may have missed something.
  private static let startTime = Duration.seconds(5)
  static let hidingRemedy = "if it misses a file, its profile hides it: martlet jail --learn finds out what it needs"

  // MARK: limits

  private static let groupName = "program"

  /// Nil when none was asked for.
  private static func makeGroups(_ options: Options) throws(JailError) -> ControlGroups? {
    guard options.limits?.isEmpty == false || options.controlGroup != nil else { return nil }
    let groups: ControlGroups
    do throws(ControlGroups.Lack) {
      groups = try ControlGroupHierarchy.groups(options.controlGroup.map { .below($0) } ?? .own, name: "jail")
    } catch { throw .host("The limits cannot be kept. \(error.sentence); \(limitsRemedy)") }
    if let lack = groups.lack(of: "the program", options.limits ?? ResourceLimits()) {
      groups.remove()
      throw .host("\(lack); \(limitsRemedy)")
    }
    return groups
  }

  private static let limitsRemedy =
    "start as 'systemd-run --scope -p Delegate=yes martlet jail ...' (with --user when not root), name a group with --cgroup, or "
    + "leave the limits out"

  /// The group with its limits; those of transfer for every disk that the program reaches.
  private static func openGroup(_ groups: ControlGroups?, _ limits: ResourceLimits, _ plan: JailPlan) throws(JailError) -> FDBox? {
    guard let groups else { return nil }
    var disks: [StorageDevice?] = []
    if limits.readRate != nil || limits.writeRate != nil {
      disks = plan.walls.disks()
      guard !disks.isEmpty else {
        throw .host(
          "What the program reaches lies on no disk of its own, so that io-read-limit and io-write-limit mean nothing; leave them out")
      }
    }
    if disks.isEmpty { disks = [nil] }
    var group: FDBox?
    for disk in disks {
      do throws(SupervisionError) { group = FDBox(try groups.group(groupName, limits, storage: disk)) } catch {
        throw .host("\(error.message ?? "The limits cannot be set"); \(limitsRemedy)")
      }
    }
    return group
  }

  static func violation(_ program: String, _ pid: Int32, _ log: borrowing KernelLog?) -> String {
    let call =
      switch log {
      case .some(let log): log.callThatKilled(pid)
      case .none: UInt32?.none
      }
    let name = call.map { "\(SystemCall.name($0)) (\($0))" }
    return "audit: sandbox violation: \(program) (pid \(pid)) was killed for calling "
      + (name.map { "\($0), which its profile does not allow, or not with these arguments; --learn adds what it needs" }
        ?? "what its profile does not allow; the kernel's audit record of it cannot be read (dmesg, type=1326)")
  }

  /// Passes signals on until the program has ended. The program is the first process of its pid namespace, which the kernel
  /// spares a signal it has no handler for; what such a signal would do elsewhere, we do.
  private static func watch(_ child: borrowing StartedChild, _ signals: borrowing OwnedFD) -> ProcessEnd? {
    var entries = [
      pollfd(fd: signals.rawValue, events: Int16(POLLIN), revents: 0),
      pollfd(fd: child.process.fd.rawValue, events: Int16(POLLIN), revents: 0),
    ]
    var ordered: CInt?
    while true {
      if let end = child.process.collect() {
        if let ordered, end == .killed(signal: SIGKILL) { return .killed(signal: ordered) }
        return end
      }
      // SAFETY: two entries of ours, alive for the call.
      _ = unsafe poll(&entries, 2, -1)
      while let number = Signals.next(from: signals) {
        child.process.signal(number)
        let isHarmless = number == SIGWINCH || number == SIGCONT
        if !isHarmless, ordered == nil, wouldDie(child.process.processID, of: number) {
          ordered = number
          child.process.signal(SIGKILL)
        }
      }
    }
  }

  /// SIGTERM, and what it would do elsewhere to the first process of a pid namespace that has no handler for it.
  static func end(_ pid: Int32, _ signal: (CInt) -> Void) {
    signal(SIGTERM)
    if wouldDie(pid, of: SIGTERM) { signal(SIGKILL) }
  }

  /// Whether the process neither catches, blocks nor ignores the signal.
  private static func wouldDie(_ pid: Int32, of signal: CInt) -> Bool {
    guard let fd = try? OwnedFD.open("/proc/\(pid)/status", O_RDONLY), let bytes = try? fd.readToEnd(limit: 8192) else { return false }
    for line in String(decoding: bytes, as: UTF8.self).split(separator: "\n") {
      for field in ["SigCgt:", "SigIgn:", "SigBlk:"] where line.hasPrefix(field) {
        let text = line.dropFirst(field.count).drop { $0 == "\t" || $0 == " " }
        if let mask = UInt64(text, radix: 16), mask >> UInt64(signal - 1) & 1 == 1 { return false }
      }
    }
    return true
  }
}
