import CSandbox
import ControlProtocol
import Glibc
import HostSystem
import Sandbox

/// A program with its jail, checked against this host: nothing of it is left to fail but the kernel itself.
package struct JailPlan {
  package var launch: ChildLaunch
  package let walls: JailWalls
  package let program: String
  /// Lacks of this host that leave the jail weaker, a sentence each.
  package let warnings: [String]

  /// - Parameters:
  ///   - words: the program and its arguments.
  ///   - defines: what `{NAME}` in the profile stands for.
  ///   - descriptors: numbers inside with what they are here, beside 0, 1 and 2 and the profile's own.
  ///   - extraPlaces: seen beside what the profile lists.
  package init(
    _ profile: JailProfile, words: [String], defines: [String: String], descriptors extra: [Int32: CInt] = [:],
    standard: (input: CInt, output: CInt, error: CInt) = (0, 1, 2), extraPlaces: [JailProfile.Place] = [],
    identity ownIdentity: ChildIdentity?, host: HostWalls, searchPath: String?
  ) throws(JailError) {
    let file = profile.file
    // Which of our descriptors a number means is known only where the caller has arranged them for the program.
    if !extra.isEmpty, !profile.descriptors.isEmpty {
      throw .contradiction(file: file, problem: "It passes on descriptors of the caller, and there are none here; leave out 'descriptor'")
    }
    guard let first = words.first, let path = Self.find(first, searchPath), unsafe access(path, F_OK) == 0 else {
      throw .program(path: words.first ?? "", .noEntry)
    }
    program = path
    var missing: String?
    if let wanted = profile.program {
      let wanted = JailProfile.expand(wanted, defines, missing: &missing)
      if Self.real(wanted) != Self.real(path) {
        throw .contradiction(
          file: file, problem: "It is made for \(wanted), not for \(path); use a profile of its own (--learn writes one)")
      }
    }
    let identity = try Self.identity(profile, ownIdentity)
    let isPrivileged = geteuid() == 0 && !host.namespaces.contains(.user)
    var namespaces = host.namespaces
    guard namespaces.isSuperset(of: [.mount, .process]), host.hasFilters else {
      throw .host("This host cannot build a jail: \(host.lacks.joined(separator: ". "))")
    }
    if profile.hasNetwork { namespaces.remove(.network) }
    warnings = host.lacks

    let walls = JailWalls()
    walls.keepsNetwork = profile.hasNetwork
    walls.landlockLevel = host.landlockLevel
    try Self.addPlaces(profile, extraPlaces, path, defines, identity, isPrivileged, walls)
    try Self.checkProgram(path, profile, walls)
    if let directory = profile.directory {
      let inside = JailProfile.expand(directory, defines, missing: &missing)
      // It may be one that is only there because places lie in it.
      guard walls.places.contains(where: { Self.covers($0, inside) || $0.path.hasPrefix(inside + "/") }) else {
        throw .contradiction(
          file: file, problem: "Its working-directory '\(inside)' is not among what it shows; add 'directory \(inside) ro'")
      }
      walls.directory = inside
    }
    for (name, value) in profile.environment {
      if let value {
        walls.environment.append("\(name)=\(JailProfile.expand(value, defines, missing: &missing))")
      } else if let text = unsafe getenv(name) {
        walls.environment.append("\(name)=\(unsafe String(cString: text))")
      }
    }
    if let missing { throw Self.undefined(missing, file) }
    walls.capabilities = profile.capabilities.reduce(0) { $0 | 1 << UInt64($1) }
    if !profile.capabilities.isEmpty, geteuid() != 0, !namespaces.contains(.user) {
      throw .contradiction(file: file, problem: "It keeps capabilities, which need root; start as root")
    }

    var table = try Self.descriptors(profile, extra, standard)
    // The executable and a pipe stand behind the last for a moment.
    while table.last == -1 { table.removeLast() }
    try Self.buildFilter(profile, walls)
    var launch = ChildLaunch(
      arguments: [first] + words.dropFirst(), descriptors: table, identity: identity, fileLimit: 1024,
      parentDeathSignal: SIGKILL, namespaces: namespaces)
    launch.jail = walls
    try Self.addLimits(profile, table.count, isCounted: identity != nil || namespaces.contains(.user), walls, &launch)
    self.walls = walls
    self.launch = launch
  }

  /// Starts it. Must be called on the main thread, as `ChildLaunch.start`.
  /// - Parameter asSibling: as there.
  package func start(asSibling: Bool = false) throws(JailError) -> StartedChild {
    let executable: OwnedFD
    do { executable = try OwnedFD.openNamed(program, pathOnly) } catch { throw .program(path: program, error.errno) }
    do { return try launch.start(executable, asSibling: asSibling) } catch {
      switch error {
      case .step(let stage, _, let errno): throw .step(stage, errno, place: nil)
      }
    }
  }

  // MARK: Parts

  static func undefined(_ name: String, _ file: String) -> JailError {
    .contradiction(file: file, problem: "Nothing says what {\(name)} stands for; add --define \(name)=VALUE")
  }

  private static func identity(_ profile: JailProfile, _ own: ChildIdentity?) throws(JailError) -> ChildIdentity? {
    switch profile.user {
    case .own: return own
    case .keep: return nil
    case .ids(let uid, let gid):
      if geteuid() == 0 { return ChildIdentity(uid: uid, gid: gid) }
      guard uid == geteuid(), gid == getegid() else {
        throw .contradiction(
          file: profile.file, problem: "Only root can start it as user \(uid):\(gid); write 'user own', or start as root")
      }
      return nil
    }
  }

  /// Along PATH, as a shell does; a name with a slash is a path.
  package static func find(_ name: String, _ searchPath: String?) -> String? {
    if name.contains("/") { return absolute(name) }
    for directory in (searchPath ?? "/usr/bin:/bin").split(separator: ":") {
      let path = "\(directory)/\(name)"
      // SAFETY: a NUL-terminated copy that lives for the call.
      if unsafe access(path, X_OK) == 0 { return absolute(path) }
    }
    return nil
  }

  private static func absolute(_ path: String) -> String? {
    if path.hasPrefix("/") { return JailProfile.normal(path) ?? real(path) }
    return real(path)
  }

  /// Without symbolic links; nil when it does not exist.
  package static func real(_ path: String) -> String? {
    // SAFETY: realpath allocates the result, which is copied and freed here.
    guard let text = unsafe realpath(path, nil) else { return nil }
    defer { unsafe free(text) }
    return unsafe String(cString: text)
  }

  private static func addPlaces(
    _ profile: JailProfile, _ extra: [JailProfile.Place], _ program: String, _ defines: [String: String],
    _ identity: ChildIdentity?, _ isPrivileged: Bool, _ walls: JailWalls
  ) throws(JailError) {
    var missing: String?
    var all = profile.places + extra
    all.append(JailProfile.Place(kind: .file, path: program, access: .run))
    for place in all {
      let text = JailProfile.expand(place.path, defines, missing: &missing)
      if let name = missing {
        missing = nil
        if place.isOptional { continue }
        throw undefined(name, profile.file)
      }
      guard let path = JailProfile.normal(text.hasPrefix("/") ? text : real(text) ?? text), path != "/" else {
        throw .place(
          path: text, file: profile.file, problem: "A place is an absolute path without '..', and not the whole root; name its parts")
      }
      if walls.places.contains(where: { $0.path == path }) { continue }
      var entry = JailWalls.Place(kind: 0, rights: 0, path: path, size: place.size, idMap: nil)
      if place.access == .readWrite { entry.rights |= Int32(CSANDBOX_PLACE_WRITABLE.rawValue) }
      if place.access == .run { entry.rights |= Int32(CSANDBOX_PLACE_EXECUTABLE.rawValue) }
      guard place.kind != .temporary else {
        entry.kind = Int32(CSANDBOX_PLACE_TEMPORARY.rawValue)
        walls.places.append(entry)
        continue
      }
      var status = stat()
      do throws(SystemError) {
        // As it was named, which may be a relative path.
        let seen = try OwnedFD.openNamed(text, pathOnly)
        // SAFETY: `status` is ours and alive for the call.
        guard unsafe fstat(seen.rawValue, &status) == 0 else { throw SystemError("look at \(text)", Errno.current) }
      } catch {
        if place.isOptional, error.errno != .foreignLink { continue }
        if error.errno == .foreignLink { throw .place(path: text, file: profile.file, problem: error.errno.explanation) }
        let error = error.errno
        throw .place(
          path: path, file: profile.file,
          problem: "\(error.explanation); install what it belongs to, mend the line, or write 'optional' behind it")
      }
      let isDirectory = status.st_mode & S_IFMT == S_IFDIR
      let isDevice = status.st_mode & S_IFMT == S_IFCHR || status.st_mode & S_IFMT == S_IFBLK
      switch place.kind {
      case .directory where !isDirectory: throw .place(path: path, file: profile.file, problem: "it is no directory; write 'file'")
      case .file where isDirectory: throw .place(path: path, file: profile.file, problem: "it is a directory; write 'directory'")
      case .file where isDevice, .device where isDevice: entry.kind = Int32(CSANDBOX_PLACE_DEVICE.rawValue)
      case .device: throw .place(path: path, file: profile.file, problem: "it is no device; write 'file'")
      case .directory: entry.kind = Int32(CSANDBOX_PLACE_DIRECTORY.rawValue)
      default: entry.kind = Int32(CSANDBOX_PLACE_FILE.rawValue)
      }
      if let identity, isPrivileged, !isDevice, needsOwnership(status, place.access, identity) {
        let map = csandbox_make_id_map(status.st_uid, status.st_gid, identity.uid, identity.gid)
        guard map >= 0 else { throw .step(.userMap, Errno(-map), place: path) }
        entry.idMap = JailWalls.OwnedIDMap(OwnedFD(owning: map))
      }
      walls.places.append(entry)
    }
    if profile.hasProc {
      walls.places.append(
        JailWalls.Place(kind: Int32(CSANDBOX_PLACE_PROC.rawValue), rights: 0, path: "/proc", size: profile.hasWholeProc ? 1 : 0, idMap: nil)
      )
    }
    // Parents before what lies in them.
    walls.places.sort { $0.path.utf8.count < $1.path.utf8.count }
  }

  /// Whether the program's own user could not use the place as its mode stands.
  private static func needsOwnership(_ status: stat, _ access: JailProfile.Access, _ identity: ChildIdentity) -> Bool {
    if status.st_uid == identity.uid { return false }
    var needed: UInt32 = access == .readWrite ? 0o6 : 0o4
    if status.st_mode & S_IFMT == S_IFDIR { needed |= 0o1 }
    return status.st_mode & needed != needed
  }

  private static func covers(_ place: JailWalls.Place, _ path: String) -> Bool {
    path == place.path
      || (place.kind != Int32(CSANDBOX_PLACE_FILE.rawValue) && path.hasPrefix(place.path + "/"))
  }

  /// Its loader and libraries, and theirs, are seen and executable.
  private static func checkProgram(_ path: String, _ profile: JailProfile, _ walls: JailWalls) throws(JailError) {
    // SAFETY: a NUL-terminated copy that lives for the call.
    guard unsafe access(path, X_OK) == 0 else { throw .program(path: path, Errno.current) }
    let program: ProgramFile
    do { program = try ProgramFile(path: path) } catch { throw .program(path: path, error.errno) }
    if program.isScript { throw .unsuitable(path: path, problem: "it is a script; name its interpreter, and show the script as a file") }
    guard program.isELF else { throw .unsuitable(path: path, problem: "it is no 64-bit ELF program") }
    let executable = Int32(CSANDBOX_PLACE_EXECUTABLE.rawValue)
    func isSeen(_ path: String) -> Bool { walls.places.contains { $0.rights & executable != 0 && covers($0, path) } }
    // SAFETY: a NUL-terminated copy that lives for the call.
    func isThere(_ path: String) -> Bool { unsafe access(path, R_OK) == 0 }
    guard let loader = program.interpreter else { return }
    guard isSeen(loader) else { throw .hidden(needed: loader, program: path, line: "file \(loader) run", file: profile.file) }
    let directories = ["/lib/x86_64-linux-gnu", "/usr/lib/x86_64-linux-gnu", "/lib64", "/usr/lib64", "/lib", "/usr/lib"]
    var queue = program.libraries
    var seen: Set<String> = []
    // Bounded: every name is looked at once, and there are at most as many as files.
    while let name = queue.popLast() {
      guard seen.insert(name).inserted else { continue }
      let places = walls.places.filter { $0.path.hasSuffix("/" + name) }.map(\.path)
      let candidates = directories.map { "\($0)/\(name)" }
      guard let found = (places + candidates).first(where: { isSeen($0) && isThere($0) }) else {
        let real = candidates.first(where: isThere) ?? "/usr/lib/\(name)"
        throw .hidden(needed: name, program: path, line: "file \(real) run", file: profile.file)
      }
      if let library = try? ProgramFile(path: found) { queue += library.libraries }
    }
  }

  private static func descriptors(
    _ profile: JailProfile, _ extra: [Int32: CInt], _ standard: (input: CInt, output: CInt, error: CInt)
  ) throws(JailError) -> [CInt] {
    var table = [CInt](repeating: -1, count: 32)
    (table[0], table[1], table[2]) = standard
    for number in profile.descriptors {
      guard fcntl(number, F_GETFD) >= 0 else {
        throw .contradiction(
          file: profile.file, problem: "It passes on descriptor \(number), which is not open; open it, or leave out the line")
      }
      table[Int(number)] = number
    }
    for (number, here) in extra { table[Int(number)] = here }
    return table
  }

  private static func addLimits(
    _ profile: JailProfile, _ descriptorCount: Int, isCounted: Bool, _ walls: JailWalls, _ launch: inout ChildLaunch
  ) throws(JailError) {
    for (limit, value) in profile.limits {
      if limit == .descriptors, value < UInt64(descriptorCount + 3) {
        throw .contradiction(
          file: profile.file,
          problem: "Limit descriptors \(value) leaves no room beside the \(descriptorCount) passed on; raise it to \(descriptorCount + 8)")
      }
      // The kernel counts by uid; of a shared one the others' processes would count too.
      if limit == .threads, !isCounted { continue }
      var present = rlimit()
      // SAFETY: ours, alive for the call.
      if unsafe getrlimit(limit.resource, &present) == 0, value > UInt64(present.rlim_max), geteuid() != 0 {
        throw .contradiction(
          file: profile.file, problem: "Limit \(limit.rawValue) \(value) is above what you may use, \(present.rlim_max); lower it")
      }
      switch limit {
      case .descriptors: launch.fileLimit = value
      case .threads: launch.threadLimit = value
      default: walls.limits.append((limit.resource, value))
      }
    }
  }

  private static func buildFilter(_ profile: JailProfile, _ walls: JailWalls) throws(JailError) {
    guard !profile.calls.isEmpty else {
      throw .contradiction(file: profile.file, problem: "It allows no system call; --learn finds out which ones the program needs")
    }
    // The kernel's generator, by Swift's.
    let bytes = UInt64.random(in: 1 ... .max)
    walls.cookie = bytes
    var rules = profile.calls
    // What execveat allows once, to us: nobody else knows the number in the argument the kernel ignores.
    rules.append(
      SystemCallRule(
        number: 322,
        conditions: [.init(argument: 5, test: .masked(.max, equals: bytes)), .init(argument: 4, test: .masked(.max, equals: 0x1000))],
        reason: "the jail starts the program"))
    let filter = SystemCallFilter(rules, processID: 1, refused: profile.refused)
    guard filter.instructions.count <= 4096 else {
      throw .contradiction(
        file: profile.file,
        problem: "Its system calls make a filter of \(filter.instructions.count) steps; the kernel takes 4096: drop conditions")
    }
    walls.filter = filter.instructions
  }
}
