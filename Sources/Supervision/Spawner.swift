import CLinux
import CSandbox
import Glibc
import HostSystem

/// A fork of the supervisor from the moment before its walls go up. It does what the supervisor may not any more, and only
/// what was known at that moment, or what a client has ordered since (`Spawner+Orders`): it starts a process of this VM again as it was started first, opens the image that such a
/// process had, connects again to a back end's socket, gives an image a new length. It is asked by the device's id; programs, arguments, paths and ids are
/// those it remembers.
///
/// What it starts is the supervisor's child (CLONE_PARENT), so that the supervisor hears of ends, and takes all down with it.
final class Spawner {
  enum Order: UInt8 {
    case start = 1
    case image, connect, tidy, startJailed, resize, order, forget, recording, adopt, drop, usage
    // An upgrade.
    case prepare, examine, renew, renewGuardian
    // Another supervisor has taken over.
    case synchronize
  }

  enum Outcome: UInt8 {
    case done, notYet, failed
  }

  /// Of a device's first descriptors, how many it adds itself: /dev/null twice and standard error.
  static let ownDescriptors = 3
  /// It opens files; a file system may hang.
  private static let patience = Duration.seconds(10)

  let socket: OwnedFD
  let process: ProcessHandle

  init(_ socket: consuming OwnedFD, _ process: consuming ProcessHandle) {
    self.socket = socket
    self.process = process
  }

  /// Forks it. In the fork this call does not return.
  static func fork(_ supervisor: Supervisor) throws(SystemError) -> Spawner {
    let pair = try UnixSocket.pair(.sequencedPacket)
    let null = try OwnedFD.open("/dev/null", O_RDWR)
    var kept = [2, null.rawValue, pair.second.rawValue]
    switch supervisor.programs {
    case .some(let programs): kept.append(programs.number)
    case .none: break
    }
    if supervisor.guardian.isOnTerminal { kept.append(0) }
    let title = Array("vm/\(supervisor.configuration.name)/spawner".utf8CString)
    // SAFETY: title and numbers live for the call.
    let pid = unsafe title.withUnsafeBufferPointer { title in
      unsafe kept.sorted().withUnsafeBufferPointer {
        unsafe csandbox_fork_helper(title.baseAddress, $0.baseAddress, CInt($0.count), supervisor.keeper == nil ? 0 : 1)
      }
    }
    if pid == 0 {
      supervisor.claims.abandon()
      for care in supervisor.cares.values { care.abandonResources() }
      serve(pair.second, null: null, supervisor)
    }
    guard pid > 0 else { throw SystemError("fork the spawner", Errno(-pid)) }
    return Spawner(pair.first, try ProcessHandle(processID: pid))
  }

  /// Readable when it has ended.
  var endNumber: CInt { process.fd.rawValue }

  deinit {
    // The end of the socket is its order to end; it has nothing to lose.
    process.signal(SIGKILL)
    _ = process.waitForEnd()
  }

  // MARK: Asking

  /// Starts the process of `id` again; `descriptors` are its 3, 4, and so on.
  func start(_ id: String, _ descriptors: [CInt]) throws(SupervisionError) -> StartedChild {
    let (_, number, received) = try ask(.start, id, descriptors)
    guard received.count == 2, let pidfd = received[0].take(), let report = received[1].take() else { throw Self.lost }
    return StartedChild(process: ProcessHandle(processID: number, adopting: pidfd), report: report)
  }

  /// Starts the jailed program of `id` again: the child, and the core's end of its connection, if it is there already.
  func startJailed(_ id: String) throws(SupervisionError) -> (child: FDChild, ours: FDBox?) {
    let (_, number, received) = try ask(.startJailed, id)
    guard received.count >= 2, let pidfd = received[0].take(), let report = received[1].take() else { throw Self.lost }
    let child = StartedChild(process: ProcessHandle(processID: number, adopting: pidfd), report: report)
    return (FDChild(child), received.count > 2 ? received[2] : nil)
  }

  /// The image of `id`, opened anew; not locked.
  func image(_ id: String) throws(SupervisionError) -> FDBox {
    let (_, _, received) = try ask(.image, id)
    guard let image = received.first else { throw Self.lost }
    return image
  }

  /// Gives the image of `id` a new length.
  func resize(_ id: String, to byteCount: UInt64) throws(SupervisionError) { _ = try ask(.resize, "\(id) \(byteCount)") }

  /// The file for a recording of a device, emptied.
  func recording(_ id: String, _ number: Int) throws(SupervisionError) -> FDBox {
    let (_, _, received) = try ask(.recording, "\(id) \(number)")
    guard let file = received.first else { throw Self.lost }
    return file
  }

  /// A connection to the external back end of `id`; nil while there is none to be had.
  func connect(_ id: String) -> FDBox? {
    let answer: (Outcome, Int32, [FDBox])? = try? ask(.connect, id)
    return answer?.2.first
  }

  /// What a process uses, as `ProcessUsage` writes it; nil when it cannot be told.
  func usage(_ id: String, _ number: Int32) -> String? {
    guard let (outcome, _, _, text) = try? askAll(.usage, "\(id) \(number)", []), outcome == .done else { return nil }
    return text
  }

  /// Unlinks files and puts the terminal right.
  func tidy() { _ = try? ask(.tidy, "") }

  /// What the order in a client's connection asks for, opened; its process is known from here on.
  func order(from client: CInt, _ identity: ChildIdentity?) throws(SupervisionError) -> Opened {
    var (_, answer, received, text) = try askAll(.order, identity.map { String($0.uid) } ?? "", [client])
    let statistics = answer & 2 != 0 ? received.popLast() : nil
    return Opened(resources: received, text: text, takesIdentity: answer & 1 != 0, statistics: statistics)
  }

  /// The device is no longer the VM's.
  func forget(_ id: String) { _ = try? ask(.forget, id) }

  /// The candidate of `id` is its back end now.
  func adopt(_ id: String) { _ = try? ask(.adopt, id) }

  /// The candidate of `id` is none any more.
  func drop(_ id: String) { _ = try? ask(.drop, id) }

  /// For a supervisor that has taken over: what the one before has asked for is answered by now, and undone: processes that it has
  /// not heard of end. False when nobody answers.
  func synchronize() -> Bool {
    let word = String(UInt64.random(in: 0 ... .max))
    guard case .bytes = UnixSocket.send(socket, [Order.synchronize.rawValue] + Array(word.utf8), waiting: false) else { return false }
    while (try? socket.waitUntil(.readable, timeout: Self.patience)) == true {
      let (bytes, received) = Self.receive(socket)
      guard let bytes else { return false }
      if bytes.dropFirst(5).elementsEqual(word.utf8) { return true }
      // Of what is no pidfd nothing comes of it.
      for box in received { _ = clinux_pidfd_send_signal(box.number, SIGKILL) }
    }
    return false
  }

  /// For a state.
  var captured: SupervisorState.Spawner {
    .init(processID: process.processID, pidfd: process.fd.rawValue, line: socket.rawValue)
  }

  static let lost = SupervisionError.launch("The process that starts others is gone, or does not answer")

  private func ask(_ order: Order, _ id: String, _ descriptors: [CInt] = []) throws(SupervisionError) -> (Outcome, Int32, [FDBox]) {
    let (outcome, number, received, _) = try askAll(order, id, descriptors)
    return (outcome, number, received)
  }

  func askAll(
    _ order: Order, _ id: String = "", _ descriptors: [CInt] = []
  ) throws(SupervisionError) -> (Outcome, Int32, [FDBox], String) {
    guard case .bytes = UnixSocket.send(socket, [order.rawValue] + Array(id.utf8), descriptors: descriptors, waiting: false),
      (try? socket.waitUntil(.readable, timeout: Self.patience)) == true
    else { throw Self.lost }
    let (bytes, received) = Self.receive(socket)
    guard let bytes, bytes.count >= 5, let outcome = Outcome(rawValue: bytes[0]) else { throw Self.lost }
    let text = String(decoding: bytes[5...], as: UTF8.self)
    if outcome == .failed { throw .launch(text) }
    var number: UInt32 = 0
    for index in 0..<4 { number |= UInt32(bytes[1 + index]) << (8 * UInt32(index)) }
    return (outcome, Int32(bitPattern: number), received, text)
  }

  /// nil: the other end is gone.
  static func receive(_ socket: borrowing OwnedFD) -> ([UInt8]?, [FDBox]) {
    var buffer = [UInt8](repeating: 0, count: 4096)
    // SAFETY: the buffer is lent for the call.
    return unsafe buffer.withUnsafeMutableBytes { bytes in
      var reception = unsafe UnixSocket.receive(socket, into: bytes, descriptorLimit: ChildLaunch.descriptorLimit, waiting: true)
      var received: [FDBox] = []
      while let fd = reception.descriptors.takeFirst() { received.append(FDBox(fd)) }
      guard case .bytes(let count) = reception.transfer, !reception.truncated else { return (nil, received) }
      return unsafe (Array(bytes[..<count]), received)
    }
  }

  // MARK: Serving

  /// What it does as root that it has to be more for than a user: files and sockets of any owner are opened and unlinked
  /// (DAC_OVERRIDE, FOWNER), taps attached (NET_ADMIN), namespaces and roots made (SYS_ADMIN, SYS_CHROOT), ids and bounding sets given
  /// to what it starts (SETGID, SETUID, SETPCAP), and it is looked at what those processes use (SYS_PTRACE).
  static let capabilities: UInt64 = [1, 3, 6, 7, 8, 12, 18, 19, 21].reduce(0) { $0 | 1 << $1 }

  /// Of all others nothing is left, but what jailed programs of this VM are to keep.
  private static func lessen(_ supervisor: Supervisor) {
    var kept = capabilities
    for known in supervisor.knownJailed.values { for number in known.device.capabilities { kept |= 1 << UInt64(number) } }
    for care in supervisor.cares.values {
      if case .jailed(let device) = care.kind { for number in device.capabilities { kept |= 1 << UInt64(number) } }
    }
    if clinux_keep_only(kept) != 0 { _exit(1) }
  }

  /// Until the supervisor is gone; does not return.
  static func serve(_ socket: borrowing OwnedFD, null: borrowing OwnedFD, _ supervisor: Supervisor) {
    lessen(supervisor)
    let upgrade = SpawnerUpgrade()
    // Another one has everything that this one has, and does what is to be done at the end.
    var isSucceeded = false
    while case (.some(let request), let received) = receive(socket) {
      var number: Int32 = 0
      var descriptors: [FDBox] = []
      var outcome = Outcome.done
      var text = ""
      let id = String(decoding: request.dropFirst(), as: UTF8.self)
      isSucceeded = false
      do throws(SupervisionError) {
        switch request.first.flatMap(Order.init(rawValue:)) {
        case .start:
          guard let known = supervisor.knownLaunches[id], received.count + ownDescriptors <= ChildLaunch.descriptorLimit else {
            throw unknown(id)
          }
          var launch = known.launch
          if supervisor.newLaunches.remove(id) == nil { launch.arguments.append(Supervisor.standbyArgument) }
          launch.descriptors = [null.rawValue, null.rawValue, 2] + received.map(\.number)
          let child = try supervisor.start(launch, known.program, of: id, asSibling: true)
          descriptors = [try copy(child.process.fd), try copy(child.report)]
          number = child.process.processID
        case .startJailed:
          guard let known = supervisor.knownJailed[id] else { throw unknown(id) }
          let started = try supervisor.launchJailed(known.device, known.identity, null: null.rawValue, asSibling: true)
          guard let child = started.child.take() else { throw unknown(id) }
          descriptors = [try copy(child.process.fd), try copy(child.report)]
          if let ours = started.ours { descriptors.append(ours) }
          number = child.process.processID
          supervisor.jailedNumbers[id] = number
        case .image:
          guard let image = supervisor.cares[id]?.image else { throw unknown(id) }
          descriptors = [FDBox(try HostFiles.imageAgain(image.path, readOnly: image.readOnly, disk: id, sameAs: image.status))]
        case .connect:
          if case .jailed? = supervisor.cares[id]?.kind, let number = supervisor.jailedNumbers[id] {
            if let socket = JailedDevice.connect(number) { descriptors = [socket] } else { outcome = .notYet }
            break
          }
          guard case .external(let path)? = supervisor.cares[id]?.kind else { throw unknown(id) }
          if let fd = try? UnixSocket.connect(to: path, timeout: .milliseconds(1)) { descriptors = [FDBox(fd)] } else { outcome = .notYet }
        case .resize:
          let words = id.split(separator: " ").map(String.init)
          guard words.count == 2, let image = supervisor.cares[words[0]]?.image, let size = UInt64(words[1]) else { throw unknown(id) }
          try HostFiles.resize(image.path, to: size, disk: words[0], sameAs: image.status)
        case .recording:
          let words = id.split(separator: " ").map(String.init)
          guard words.count == 2, let number = Int(words[1]) else { throw unknown(id) }
          descriptors = [FDBox(try supervisor.recordingFile(words[0], number))]
        case .usage:
          let words = id.split(separator: " ").map(String.init)
          guard words.count == 2, let process = Int32(words[1]), isOfThisVM(process) else { throw unknown(id) }
          text = ProcessUsage.text(of: process, group: supervisor.groups?.member(words[0]))
        case .tidy: supervisor.guardian.tidy()
        case .order:
          guard let client = received.first?.take() else { throw unknown("") }
          let opened = try Self.serve(order: id, client, null: null.rawValue, supervisor)
          descriptors = opened.resources + (opened.statistics.map { [$0] } ?? [])
          text = opened.text
          number = (opened.takesIdentity ? 1 : 0) | (opened.statistics == nil ? 0 : 2)
        case .forget: supervisor.forget(id)
        case .adopt:
          if let plan = supervisor.candidates.removeValue(forKey: id) {
            supervisor.adopt(id, plan.care, plan.configuration, plan.extraArguments)
          }
        case .drop:
          supervisor.candidates[id] = nil
          supervisor.dropCandidate(id)
        case .synchronize: text = id
        case .prepare: descriptors = try upgrade.prepare(supervisor)
        case .examine: (number, descriptors) = try upgrade.examine(null: null.rawValue, supervisor)
        case .renew:
          (number, descriptors, text) = try upgrade.renew(null: null.rawValue, supervisor)
          isSucceeded = descriptors.count > 1
        case .renewGuardian:
          let guardian = try supervisor.guardian.startForParent()
          (number, descriptors) = (guardian.number, [guardian.process, guardian.pipe])
        case nil: throw unknown("")
        }
      } catch {
        outcome = .failed
        text = error.message ?? "It failed"
      }
      reply(socket, outcome, number, descriptors.map(\.number), text)
      // Numbers keep nothing open.
      withExtendedLifetime((received, descriptors)) {}
    }
    if !isSucceeded { supervisor.guardian.tidyAdded() }
    _exit(0)
  }

  static func copy(_ fd: borrowing OwnedFD) throws(SupervisionError) -> FDBox {
    do { return FDBox(try fd.duplicate()) } catch { throw .system(error) }
  }

  private static func unknown(_ id: String) -> SupervisionError { .launch("The spawner knows no '\(id)' that it could serve") }

  static func reply(_ socket: borrowing OwnedFD, _ outcome: Outcome, _ number: Int32, _ descriptors: [CInt], _ text: String) {
    let bytes = UInt32(bitPattern: number)
    let packet = [outcome.rawValue] + (0..<4).map { UInt8(truncatingIfNeeded: bytes >> (8 * UInt32($0))) } + text.utf8.prefix(2048)
    _ = UnixSocket.send(socket, packet, descriptors: descriptors)
  }
}

extension Supervisor {
  /// The image of a device, opened anew for its next process; not locked.
  func openAgain(_ id: String, _ image: DeviceCare.Image, byUs: Bool = false) throws(SupervisionError) -> FDBox {
    if let spawner, !byUs { return try spawner.image(id) }
    return FDBox(try HostFiles.imageAgain(image.path, readOnly: image.readOnly, disk: id, sameAs: image.status))
  }

  /// Opens the image for the process after the next one to serve. Without it there is less to be told, and no more.
  /// - Parameters:
  ///   - name: what the spawner knows it by, if not by its device's id.
  ///   - byUs: not by the spawner, while this process may still open files.
  func openAhead(_ care: DeviceCare, as name: String? = nil, byUs: Bool = false) {
    guard let image = care.image, !image.readOnly, !image.isShared, care.imageAhead == nil else { return }
    care.imageAhead = try? openAgain(name ?? care.id, image, byUs: byUs)
  }

  /// A new connection to an external back end; nil: not yet.
  func connectAgain(_ id: String, _ path: String) -> FDBox? {
    if let spawner { return spawner.connect(id) }
    guard let fd = try? UnixSocket.connect(to: path, timeout: .milliseconds(1)) else { return nil }
    return FDBox(fd)
  }
}
