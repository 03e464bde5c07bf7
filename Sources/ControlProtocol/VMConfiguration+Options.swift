import VirtioSpec

extension VMConfiguration {
  /// The options of `martlet run`, in the order in which `--help` shows them.
  package static let optionTable = OptionTable<Draft>(
    guestOptions + deviceOptions + terminalOptions + controlOptions)

  private typealias Option = OptionDescription<Draft>

  private static let guestOptions: [Option] = [
    Option(
      "kernel", .text("PATH"), group: "Guest", summary: "Linux kernel: bzImage, or ELF vmlinux with a PVH entry",
      example: "--kernel bzImage"
    ) { (draft, values) throws(ConfigurationError) in
      guard isPath(values.text) else { throw values.badText("a path of 1 to 4095 bytes") }
      draft.result.kernel = values.text
      draft.hasKernel = true
    },
    Option(
      "initramfs", .text("PATH"), group: "Guest", summary: "initial RAM file system", example: "--initramfs initrd.img"
    ) { (draft, values) throws(ConfigurationError) in
      guard isPath(values.text) else { throw values.badText("a path of 1 to 4095 bytes") }
      draft.result.initramfs = values.text
    },
    Option(
      "cmdline", .text("TEXT"), group: "Guest", summary: "kernel command line",
      example: "--cmdline 'console=hvc0 root=/dev/vda'"
    ) { (draft, values) throws(ConfigurationError) in
      let bytes = values.text.utf8
      guard bytes.count <= Limits.commandLine else { throw values.badText("at most \(Limits.commandLine) bytes") }
      guard !bytes.contains(where: { $0 < 0x20 }) else { throw values.badText("text without control characters") }
      draft.result.commandLine = values.text
    },
    Option(
      "cpus", .list(keys: [KeyDescription("boot", "N", required: true, "virtual processors at boot")]), group: "Guest",
      summary: "virtual processors; one when left out", example: "--cpus boot=2"
    ) { (draft, values) throws(ConfigurationError) in
      if let count = try values.number("boot", in: 1...UInt64(Limits.cpus)) { draft.result.cpuCount = Int(count) }
    },
    Option(
      "memory", .list(keys: [KeyDescription("size", "SIZE", required: true, "bytes, or with K, M, G, T")]),
      group: "Guest", summary: "guest memory; 512M when left out", example: "--memory size=512M"
    ) { (draft, values) throws(ConfigurationError) in
      let text = try values.required("size")
      let range = Limits.smallestMemory...Limits.largestMemory
      guard let size = Quantity.byteCount(text), range.contains(size), size % 4096 == 0 else {
        throw values.bad("size", "a multiple of 4K from 4M to 8T")
      }
      draft.result.memorySize = size
    },
    Option(
      "no-reboot", .none, group: "Guest", summary: "a guest reset ends the VM instead of starting it again",
      example: "--no-reboot"
    ) { (draft, _) throws(ConfigurationError) in draft.result.restartsOnReset = false },
  ]

  private static let deathKeys = [
    KeyDescription("on-death", "restart|hold|fail|stop-vm", "when its back end dies; restart when left out"),
    KeyDescription("restart-limit", "N", "deaths a minute before it is given up; 5 when left out"),
  ]

  private static let spareKeys = [
    KeyDescription("spare", "on|off", "a second process waits to take over, for some 0.5 MiB of memory; off when left out")
  ]

  private static let waitKey = KeyDescription(
    "wait", "SECONDS", "how long to wait for the socket; at the start not at all, later for ever when left out")

  private static let vhostUserKeys = [
    KeyDescription("vhost_user", "on|off", "served by a back end of somebody else's"),
    KeyDescription("socket", "PATH", "listening socket of that back end, started by hand"),
    waitKey,
    KeyDescription("program", "\"WORD ...\"", "or: the back end to start, in a jail; {listen}, {fd} or {socket} in it"),
    KeyDescription("jail", "FILE", "profile of that jail (martlet jail --help)"),
  ]

  /// Zero: as many as there are processors, which are not known yet. A back end of others may have only one.
  private static func defaultQueueCount(_ source: Disk.Source) -> UInt64 { if case .image = source { 0 } else { 1 } }

  private static func diskArguments(_ values: OptionValues) throws(ConfigurationError) -> [String] {
    var arguments: [String] = []
    func choice(_ key: String, _ words: [String]) throws(ConfigurationError) -> String? {
      guard let text = values[key] else { return nil }
      guard words.contains(text) else { throw values.bad(key, words.joined(separator: " or ")) }
      return text
    }
    if try choice("format", ["raw"]) != nil { arguments.append(Disk.rawArgument) }
    if try values.onOff("direct", default: false) { arguments.append("--direct") }
    if try values.onOff("force_share", default: false) { arguments.append("--force-share") }
    if try values.onOff("portable", default: false) { arguments.append("--portable") }
    if try values.onOff("registered", default: false) { arguments.append("--registered-file") }
    if !(try values.onOff("cache_map", default: true)) { arguments.append("--cache-map=off") }
    var missing: [String] = []
    for feature in ["packed", "event_idx", "indirect_desc"] where !(try values.onOff(feature, default: true)) { missing.append(feature) }
    if !missing.isEmpty { arguments.append("--ring-without=" + missing.joined(separator: ",")) }
    if let how = try choice("aio", ["io_uring", "threads"]) { arguments.append("--aio=\(how)") }
    if let size = try choice("block_size", ["512", "4096"]) { arguments.append("--block-size=\(size)") }
    if let text = values["poll"] {
      guard text == "auto" || text == "off" || Quantity.unsigned(text).map({ (1...1_000_000).contains($0) }) == true else {
        throw values.bad("poll", "auto, off, or microseconds from 1 to 1000000")
      }
      arguments.append("--poll=\(text)")
    }
    for name in ["bw", "ops"] {
      let time = try values.number(name + "_refill_time", in: 1...86_400_000)
      let hasSize = values.has(key: name + "_size")
      guard hasSize == (time != nil), hasSize || !values.has(key: name + "_one_time_burst") else {
        throw .missingKey(option: values.option, key: hasSize ? name + "_refill_time" : name + "_size", example: values.example)
      }
      for (key, least) in [(name + "_size", 1), (name + "_one_time_burst", 0)] as [(String, UInt64)] {
        guard let text = values[key] else { continue }
        guard let number = Quantity.byteCount(text), (least...(1 << 50)).contains(number) else {
          throw values.bad(key, "a number from \(least) to 1024T")
        }
        arguments.append("--\(key.replacing("_", with: "-"))=\(number)")
      }
      if let time { arguments.append("--\(name)-refill-time=\(time)") }
    }
    return arguments
  }

  private static let deviceOptions: [Option] = [
    Option(
      "disk",
      .list(
        keys: [
          KeyDescription("path", "FILE", "raw image or block device"),
          KeyDescription("readonly", "on|off", "the guest cannot write"),
          KeyDescription("format", "raw", "the image is meant as it is, even if it begins like one in another format"),
          KeyDescription("id", "NAME", "name of the device; blk0, blk1, ... when left out"),
          KeyDescription("serial", "TEXT", "serial number the guest reads, at most 20 bytes"),
          KeyDescription("num_queues", "N", "queues; one for each processor, at most 64, when left out"),
          KeyDescription("queue_size", "N", "descriptors of a queue, to 1024; 256 when left out"),
          KeyDescription("direct", "on|off", "bypass the host's page cache"),
          KeyDescription("aio", "io_uring|threads", "how the storage is reached; io_uring where it can be, threads on FUSE"),
          KeyDescription("block_size", "512|4096", "logical block; the storage's own when left out"),
          KeyDescription("poll", "auto|off|US", "look for work before sleeping; auto when left out"),
          KeyDescription("portable", "on|off", "promise the guest no more than QEMU's storage daemon does, which can take over then"),
          KeyDescription("registered", "on|off", "register the image with io_uring: cheaper, but locked longer after a kill"),
          KeyDescription("cache_map", "on|off", "copy cached data from a mapping of the image; on when left out"),
          KeyDescription("packed", "on|off", "offer the guest packed rings; so with event_idx and indirect_desc; on when left out"),
          KeyDescription("event_idx", "on|off", "offer indices that say when to notify"),
          KeyDescription("indirect_desc", "on|off", "offer requests in tables of their own"),
          KeyDescription("force_share", "on|off", "with readonly=on: no lock, though others may write the image"),
          KeyDescription("bw_size", "BYTES", "rate limit: bytes that refill within bw_refill_time"),
          KeyDescription("bw_one_time_burst", "BYTES", "bytes more, once"),
          KeyDescription("bw_refill_time", "MS", "milliseconds"),
          KeyDescription("ops_size", "COUNT", "rate limit: requests that refill within ops_refill_time"),
          KeyDescription("ops_one_time_burst", "COUNT", "requests more, once"),
          KeyDescription("ops_refill_time", "MS", "milliseconds"),
        ] + ResourceLimits.keys + ResourceLimits.storageKeys + deathKeys + spareKeys + vhostUserKeys), .many, group: "Devices",
      summary: "virtio block device, served by its own process", example: "--disk path=root.img"
    ) { (draft, values) throws(ConfigurationError) in
      let serial = values["serial"]
      if let serial, serial.utf8.count > Limits.serial || !serial.utf8.allSatisfy({ (0x20...0x7E).contains($0) }) {
        throw values.bad("serial", "at most \(Limits.serial) printable ASCII characters")
      }
      let source: Disk.Source
      if let external = try values.external(excluding: ["path", "readonly", "serial"]) {
        source = .external(external)
      } else {
        guard let path = try values.path("path") else {
          throw .missingKey(option: values.option, key: "path", example: values.example)
        }
        source = .image(path: path, readOnly: try values.onOff("readonly", default: false))
      }
      let arguments = try diskArguments(values)
      if case .image = source {
      } else if let argument = arguments.first {
        throw .conflict("--disk socket", argument, remedy: "that is for our own back end; leave it out")
      }
      let isShared = try values.onOff("force_share", default: false)
      if isShared, !(try values.onOff("readonly", default: false)) { throw values.bad("force_share", "readonly=on beside it") }
      var disk = Disk(
        id: "", source: source, serial: serial,
        queueCount: UInt16(try values.number("num_queues", in: 1...UInt64(Limits.queues)) ?? defaultQueueCount(source)),
        queueSize: try values.queueSize("queue_size") ?? 256, death: try values.deathPolicy())
      if disk.death.hasSpare, case .external = source {
        throw .conflict("--disk vhost_user=on", "spare=on", remedy: "leave out spare=, that back end is not ours")
      }
      if case .image = source, disk.queueSize > 1024 { throw values.bad("queue_size", "a power of two from 2 to 1024") }
      disk.backEndArguments = arguments
      disk.isShared = isShared
      draft.add(.disk(disk), id: try values.id(), option: values.option, limits: try values.limits())
    },
    Option(
      "net",
      .list(
        keys: [
          KeyDescription("tap", "NAME", "existing tap interface"),
          KeyDescription("mac", "MAC", "address of the guest's card; derived from the names when left out"),
          KeyDescription("id", "NAME", "name of the device; net0, net1, ... when left out"),
          KeyDescription("queue_size", "N", "descriptors of a queue; 256 when left out"),
        ] + ResourceLimits.keys + deathKeys + vhostUserKeys), .many, group: "Devices",
      summary: "virtio network card, served by its own process", example: "--net tap=tap0"
    ) { (draft, values) throws(ConfigurationError) in
      let source: Net.Source
      if let external = try values.external(excluding: ["tap"]) {
        source = .external(external)
      } else {
        let tap = try values.required("tap")
        guard (1...Limits.interfaceName).contains(tap.utf8.count), tap != ".", tap != "..",
          tap.utf8.allSatisfy({ $0 > 0x20 && $0 < 0x7F && $0 != UInt8(ascii: "/") && $0 != UInt8(ascii: "%") })
        else { throw values.bad("tap", "an interface name of 1 to 15 characters") }
        source = .tap(tap)
      }
      var address: [UInt8]?
      if let text = values["mac"] {
        guard let bytes = mac(text) else {
          throw values.bad("mac", "six pairs of hexadecimal digits of a unicast address, such as 52:54:00:12:34:56")
        }
        address = bytes
      }
      let net = Net(
        id: "", source: source, mac: address, queueSize: try values.queueSize("queue_size") ?? 256,
        death: try values.deathPolicy())
      draft.add(.net(net), id: try values.id(), option: values.option, limits: try values.limits())
    },
    Option(
      "fs",
      .list(
        keys: [
          KeyDescription("tag", "NAME", required: true, "what the guest mounts it by, at most \(Limits.tag) bytes"),
          KeyDescription("socket", "PATH", "listening socket of the file system daemon (virtiofsd), started by hand"),
          waitKey,
          KeyDescription("program", "\"WORD ...\"", "or: the daemon to start, in a jail; {listen}, {fd} or {socket} in it"),
          KeyDescription("jail", "FILE", "profile of that jail (martlet jail --help)"),
          KeyDescription("path", "DIRECTORY", "what that program serves; {path} in it and in the profile"),
          KeyDescription("id", "NAME", "name of the device; fs0, fs1, ... when left out"),
          KeyDescription("num_queues", "N", "request queues; one when left out"),
          KeyDescription("queue_size", "N", "descriptors of a queue; 1024 when left out"),
        ] + ResourceLimits.keys + deathKeys), .many, group: "Devices", summary: "virtio file system, served by a virtiofsd",
      example: "--fs tag=home,socket=fs.sock"
    ) { (draft, values) throws(ConfigurationError) in
      let tag = try values.required("tag")
      guard FileSystemConfiguration(tag: tag) != nil else { throw values.bad("tag", "1 to \(Limits.tag) bytes") }
      guard values.has(key: "socket") || values.has(key: "program") else {
        throw .missingKey(option: values.option, key: "socket", example: values.example)
      }
      let fileSystem = FileSystem(
        id: "", tag: tag, source: try values.externalSource(),
        // One more is the queue for urgent requests.
        queueCount: UInt16(try values.number("num_queues", in: 1...UInt64(Limits.queues - 1)) ?? 1),
        queueSize: try values.queueSize("queue_size") ?? 1024, death: try values.deathPolicy())
      draft.add(.fileSystem(fileSystem), id: try values.id(), option: values.option, limits: try values.limits())
    },
    Option(
      "rng",
      .list(
        keys: [
          KeyDescription("src", "PATH", "character device that random bytes are read from; /dev/urandom when left out"),
          KeyDescription("id", "NAME", "name of the device; rng0 when left out"),
        ] + ResourceLimits.keys + deathKeys + spareKeys, words: [KeyDescription("on", "", "with /dev/urandom")]), group: "Devices",
      summary: "virtio entropy device (hwrng), served by its own process", example: "--rng on"
    ) { (draft, values) throws(ConfigurationError) in
      if values.has(word: "on"), values.has(key: "src") {
        throw .conflict("--rng on", "src=", remedy: "leave out one of them")
      }
      let entropy = Entropy(id: "", source: try values.path("src") ?? "/dev/urandom", death: try values.deathPolicy())
      draft.add(.entropy(entropy), id: try values.id(), option: values.option, limits: try values.limits())
    },
    Option(
      "generic-vhost-user",
      .list(
        keys: [
          KeyDescription("socket", "PATH", "listening socket of the back end, started by hand"),
          waitKey,
          KeyDescription("program", "\"WORD ...\"", "or: the back end to start, in a jail; {listen}, {fd} or {socket} in it"),
          KeyDescription("jail", "FILE", "profile of that jail (martlet jail --help)"),
          KeyDescription("path", "FILE|DIRECTORY", "what that program serves; {path} in it and in the profile"),
          KeyDescription("device_type", "NAME|ID", required: true, "virtio device type, such as fs or 26"),
          KeyDescription("queue_sizes", "[N,...]", required: true, "descriptors of each queue"),
          KeyDescription("id", "NAME", "name of the device"),
        ] + deathKeys + ResourceLimits.keys), .many, group: "Devices", summary: "any virtio device behind a vhost-user socket",
      example: "--generic-vhost-user socket=fs.sock,device_type=fs,queue_sizes=[128,128]"
    ) { (draft, values) throws(ConfigurationError) in
      let typeText = try values.required("device_type")
      guard let type = DeviceID(nameOrNumber: typeText) else {
        let near = EditDistance.nearest(to: typeText, in: DeviceID.named.map(\.name)).map { " (did you mean '\($0)'?)" } ?? ""
        throw values.bad("device_type", "a virtio device name or a number from 1 to 63\(near)")
      }
      let rule = "a list of 1 to \(Limits.queues) powers of two from 2 to \(Limits.queueSize), such as [128,128]"
      guard let numbers = ListGrammar.numbers(of: try values.required("queue_sizes"), limit: Limits.queues) else {
        throw values.bad("queue_sizes", rule)
      }
      let sizes = numbers.compactMap(checkedQueueSize)
      guard !sizes.isEmpty, sizes.count == numbers.count else { throw values.bad("queue_sizes", rule) }
      guard values.has(key: "socket") || values.has(key: "program") else {
        throw .missingKey(option: values.option, key: "socket", example: values.example)
      }
      let generic = GenericVhostUser(
        id: "", source: try values.externalSource(), deviceType: type, queueSizes: sizes, death: try values.deathPolicy())
      draft.add(.generic(generic), id: try values.id(), option: values.option, limits: try values.limits())
    },
  ]

  private static func terminalShape(_ more: [KeyDescription]) -> Option.Shape {
    .list(
      keys: [
        KeyDescription("file", "PATH", "output is appended to the file"),
        KeyDescription("socket", "PATH", "listening Unix socket made for it"),
      ] + ResourceLimits.keys + more,
      words: [
        KeyDescription("tty", "", "the terminal that martlet runs on"),
        KeyDescription("pty", "", "a new pseudo-terminal, whose path is printed"),
        KeyDescription("null", "", "output is dropped"),
        KeyDescription("off", "", "the device does not exist"),
      ])
  }

  private static let terminalOptions: [Option] = [
    Option(
      "console", terminalShape(deathKeys), group: "Consoles",
      summary: "virtio console (hvc0); tty when left out", example: "--console tty"
    ) { (draft, values) throws(ConfigurationError) in
      draft.console = try terminal(values)
      draft.result.consoleDeath = try values.deathPolicy()
      draft.limit(Reserved.console, try values.limits())
    },
    Option(
      "serial", terminalShape([]), group: "Consoles",
      summary: "serial port (ttyS0); null when left out", example: "--serial file=boot.log"
    ) { (draft, values) throws(ConfigurationError) in
      draft.serial = try terminal(values)
      draft.limit(Reserved.serial, try values.limits())
    },
  ]

  /// What `martlet ctl add` reads: the devices, and a console without the terminal of `martlet run`, which has its owner.
  static let addTable = OptionTable<Draft>(deviceOptions + [addedConsole])

  private static let addedConsole = Option(
    "console",
    .list(
      keys: [
        KeyDescription("file", "PATH", "output is appended to the file"),
        KeyDescription("socket", "PATH", "listening Unix socket made for it"),
        KeyDescription("id", "NAME", "name of the device; con1, con2, ... when left out"),
      ] + ResourceLimits.keys + deathKeys,
      words: [
        KeyDescription("pty", "", "a new pseudo-terminal, whose path is told"),
        KeyDescription("null", "", "output is dropped"),
      ]), .many, group: "Consoles", summary: "virtio console", example: "add console pty"
  ) { (draft, values) throws(ConfigurationError) in
    let places = values.parts.filter { ["file", "socket", "pty", "null"].contains($0.key) }
    guard places.count == 1 else { throw values.badText("one of pty, file=PATH, socket=PATH, null") }
    let terminal: Terminal
    if let path = try values.path("file") {
      terminal = .file(path)
    } else if let path = try values.socketPath("socket") {
      terminal = .socket(path)
    } else {
      terminal = values.has(word: "pty") ? .pty : .null
    }
    draft.add(
      .console(Console(id: "", terminal: terminal, death: try values.deathPolicy())), id: try values.id(), option: values.option,
      limits: try values.limits())
  }

  private static func terminal(_ values: OptionValues) throws(ConfigurationError) -> Terminal {
    let target = values.parts.filter { part in !(ResourceLimits.keys + deathKeys).contains { $0.name == part.key } }
    guard target.count == 1 else {
      throw values.badText("one of tty, pty, file=PATH, socket=PATH, null, off")
    }
    if let path = try values.path("file") { return .file(path) }
    if let path = try values.socketPath("socket") { return .socket(path) }
    switch target[0].key {
    case "tty": return .tty
    case "pty": return .pty
    case "null": return .null
    default: return .off
    }
  }

  private static let controlOptions: [Option] = [
    Option(
      "name", .text("NAME"), group: "Running", summary: "name of the VM in process titles and logs; vm when left out",
      example: "--name web1"
    ) { (draft, values) throws(ConfigurationError) in
      guard isName(values.text) else { throw values.badText(nameRule) }
      draft.result.name = values.text
    },
    Option(
      "control", .text("PATH"), group: "Running", summary: "socket for martlet ctl", example: "--control web1.ctl"
    ) { (draft, values) throws(ConfigurationError) in
      guard isSocketPath(values.text) else { throw values.badText("a socket path of 1 to 107 bytes") }
      draft.result.control = values.text
    },
    Option(
      "flight-recorder", .text("DIRECTORY"), group: "Running",
      summary: "a lost back end's last messages go into a file there (martlet probe decode)",
      example: "--flight-recorder /var/log/martlet"
    ) { (draft, values) throws(ConfigurationError) in
      guard isPath(values.text) else { throw values.badText("a path of 1 to 4095 bytes") }
      draft.result.flightRecorder = values.text
    },
    Option(
      "deadline",
      .list(keys: [
        KeyDescription("ready", "MS", "from the start of a process to its READY; 5000 when left out"),
        KeyDescription("connect", "MS", "for connecting to a back end's socket; 2000 when left out"),
        KeyDescription("reply", "MS", "for each answer of a back end; 5000 when left out"),
        KeyDescription("fence", "MS", "for writes of a dead block process to end; 60000 when left out"),
      ]), group: "Running", summary: "how long to wait, in milliseconds", example: "--deadline ready=10000"
    ) { (draft, values) throws(ConfigurationError) in
      let range = 1...Limits.milliseconds
      if let time = try values.number("ready", in: range) { draft.result.deadlines.ready = UInt32(time) }
      if let time = try values.number("connect", in: range) { draft.result.deadlines.connect = UInt32(time) }
      if let time = try values.number("reply", in: range) { draft.result.deadlines.reply = UInt32(time) }
      if let time = try values.number("fence", in: range) { draft.result.deadlines.fence = UInt32(time) }
    },
    Option(
      "on-supervisor-death", .text("POLICY"), group: "Running",
      summary: "when the supervisor is killed or crashes: end (when left out) or continue",
      example: "--on-supervisor-death continue"
    ) { (draft, values) throws(ConfigurationError) in
      guard ["end", "continue"].contains(values.text) else { throw values.badText("end or continue") }
      draft.result.outlivesSupervisor = values.text == "continue"
    },
    Option(
      "sandbox", .text("MODE"), group: "Running",
      summary: "walls around the VM's processes: on when left out; off or log for debugging",
      example: "--sandbox on"
    ) { (draft, values) throws(ConfigurationError) in
      guard let mode = Sandbox(rawValue: values.text) else { throw values.badText("on, off or log") }
      draft.result.sandbox = mode
    },
    Option(
      "hardened", .none, group: "Running", summary: "refuse to start where the host lacks a part of the walls",
      example: "--hardened"
    ) { (draft, _) throws(ConfigurationError) in draft.result.isHardened = true },
    Option(
      "cgroup", .text("PATH"), group: "Running",
      summary: "where to make control groups, or off; in our own, if ours alone, when left out",
      example: "--cgroup /sys/fs/cgroup/machines"
    ) { (draft, values) throws(ConfigurationError) in
      guard isPath(values.text) else { throw values.badText("a directory of a cgroup2 file system, or off") }
      draft.result.controlGroup = values.text == "off" ? .off : .below(values.text)
    },
    Option(
      "uid-base", .text("UID"), group: "Running",
      summary: "first of 60 uids for the VM's processes when run as root, from 1000 on", example: "--uid-base 1900000000"
    ) { (draft, values) throws(ConfigurationError) in
      guard let uid = Quantity.unsigned(values.text), (1000...0xFFFF_FF00).contains(uid) else {
        throw values.badText("a uid from 1000 to 4294967040; those below are the host's own")
      }
      draft.result.uidBase = UInt32(uid)
    },
  ]
}

extension OptionValues {
  fileprivate func deathPolicy() throws(ConfigurationError) -> VMConfiguration.DeathPolicy {
    var policy = VMConfiguration.DeathPolicy()
    if let text = self["on-death"] {
      guard let action = VMConfiguration.DeathPolicy.Action(rawValue: text) else {
        throw bad("on-death", "restart, hold, fail or stop-vm")
      }
      policy.action = action
    }
    if let limit = try number("restart-limit", in: 0...100_000) { policy.limit = Int(limit) }
    if let seconds = try number("wait", in: 0...86_400) {
      guard has(key: "socket") else { throw bad("wait", "a back end at a socket; leave it out") }
      policy.patience = seconds * 1000
    }
    policy.hasSpare = try onOff("spare", default: false)
    if policy.hasSpare, policy.action != .restart { throw bad("spare", "on-death=restart beside it, or off") }
    return policy
  }

  /// Who serves the device when `vhost_user=on`; nil when we do it ourselves.
  fileprivate func external(excluding keys: [String]) throws(ConfigurationError) -> VMConfiguration.External? {
    guard try onOff("vhost_user", default: false) else {
      for key in ["socket", "program", "jail"] where has(key: key) {
        throw .conflict("--\(option) \(key)=", "vhost_user=off", remedy: "add vhost_user=on or leave out \(key)=")
      }
      return nil
    }
    for key in keys where has(key: key) && !(key == "path" && has(key: "program")) {
      throw .conflict("--\(option) vhost_user=on", "\(key)=", remedy: "leave out \(key)=, the back end decides it")
    }
    guard has(key: "socket") || has(key: "program") else {
      throw .missingKey(option: option, key: "socket", example: "--\(option) vhost_user=on,socket=backend.sock")
    }
    return try externalSource()
  }

  /// A socket, or a program with its jail.
  fileprivate func externalSource() throws(ConfigurationError) -> VMConfiguration.External {
    guard let text = self["program"] else {
      for key in ["jail", "path"] where has(key: key) {
        throw .conflict("--\(option) socket=", "\(key)=", remedy: "\(key)= goes with program=; leave out one of them")
      }
      guard let path = try socketPath("socket") else { throw bad("socket", "a socket path of 1 to 107 bytes") }
      return .socket(path)
    }
    if has(key: "socket") { throw .conflict("--\(option) socket=", "program=", remedy: "leave out one of them") }
    guard let profile = try path("jail") else {
      throw .missingKey(option: option, key: "jail", example: "--\(option) ...,program=\"...\",jail=backend.jail")
    }
    guard let words = Self.words(text), !words.isEmpty, words.count <= 256, !text.utf8.contains(0) else {
      throw bad("program", "the program and its arguments, blanks between them, 'single quotes' around what has blanks")
    }
    let program = VMConfiguration.JailedProgram(words: words, profile: profile, path: try path("path"))
    let conventions = VMConfiguration.JailedProgram.Convention.allCases.filter { convention in
      words.contains { VMConfiguration.JailedProgram.contains($0, convention.rawValue) }
    }
    guard conventions.count == 1 else {
      throw bad("program", "exactly one of {listen}, {fd} and {socket} among its arguments, which is how it gets its connection")
    }
    if program.path == nil, words.contains(where: { VMConfiguration.JailedProgram.contains($0, "{path}") }) {
      throw .missingKey(option: option, key: "path", example: "path=FILE, which {path} in program= stands for")
    }
    return .program(program)
  }

  /// Words at blanks; 'single quotes' keep blanks together. Nil when one is not closed.
  private static func words(_ text: String) -> [String]? {
    var words: [String] = []
    var word: String?
    var isQuoted = false
    for character in text {
      switch character {
      case "'":
        isQuoted.toggle()
        word = word ?? ""
      case " " where !isQuoted, "\n" where !isQuoted, "\t" where !isQuoted:
        if let done = word { words.append(done) }
        word = nil
      default: word = (word ?? "") + String(character)
      }
    }
    if let done = word { words.append(done) }
    return isQuoted ? nil : words
  }
}
