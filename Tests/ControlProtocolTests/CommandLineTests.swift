import ControlProtocol
import Testing
import VirtioSpec

private func parse(_ arguments: String...) throws -> VMConfiguration { try VMConfiguration(arguments: arguments) }

/// The line that a person sees, or nil when the arguments are accepted.
private func complaint(_ arguments: String...) -> String? {
  do throws(ConfigurationError) {
    _ = try VMConfiguration(arguments: ["--kernel", "k"] + arguments)
    return nil
  } catch { return error.message }
}

@Suite struct CommandLineTests {
  @Test func kernelAloneIsAVM() throws {
    let vm = try parse("--kernel", "bzImage")
    #expect(vm.kernel == "bzImage")
    #expect(vm.cpuCount == 1)
    #expect(vm.memorySize == 512 << 20)
    #expect(vm.console == .tty)
    #expect(vm.serial == .null)
    #expect(vm.restartsOnReset)
  }

  @Test func valueMayFollowOrBeAttached() throws {
    let vm = try parse("--kernel=a=b", "--cmdline=--quiet", "--name", "web1", "--no-reboot", "--cpus=boot=4")
    #expect(vm.kernel == "a=b")
    #expect(vm.commandLine == "--quiet")
    #expect(vm.name == "web1")
    #expect(vm.cpuCount == 4)
    #expect(!vm.restartsOnReset)
  }

  @Test func severalValuesPerFlagAndRepeatedFlagsMakeOneList() throws {
    let vm = try parse("--disk", "path=a", "path=b,readonly=on,id=x", "--kernel", "k", "--disk=path=c,serial=S1")
    #expect(vm.disks.map(\.id) == ["blk0", "x", "blk1"])
    #expect(vm.disks[1].source == .image(path: "b", readOnly: true))
    #expect(vm.disks[2].serial == "S1")
  }

  @Test func limitsBelongToTheDeviceTheyStandAt() throws {
    let vm = try parse(
      "--kernel", "k", "--memory", "size=64M", "--disk", "path=a,cpu-limit=150%,memory-limit=1G,pids-limit=40,io-read-limit=10M",
      "path=b", "--net", "tap=t,cpu-weight=7", "--rng", "on,cpu-limit=1%", "--console", "null,cpu-limit=2%", "--cgroup", "/x")
    #expect(vm.limits.keys.sorted() == ["blk0", "con0", "net0", "rng0"])
    let limits = vm.limits(of: "blk0")
    #expect(limits.processorPercent == 150 && limits.memory == 1 << 30 && limits.threads == 40 && limits.readRate == 10 << 20)
    #expect(vm.limits(of: "blk1").isEmpty && vm.limits(of: "net0").processorWeight == 7)
    #expect(vm.console == .null && vm.controlGroup == .below("/x"))
  }

  @Test func impossibleLimitsAreRefusedWithTheRemedy() {
    for (value, hint) in [
      ("cpu-limit=50", "from 1% to 100000%"), ("cpu-limit=0%", "from 1%"), ("cpu-limit=-1%", "from 1%"), ("cpu-weight=0", "1 to 10000"),
      ("io-weight=10001", "1 to 10000"), ("pids-limit=0", "1 to 1000000"), ("memory-limit=1", "16M to 1024T"),
      ("memory-limit=2000T", "16M to 1024T"), ("memory-limit=512M", "at least 528M"), ("io-read-limit=1", "4K to 1024T"),
      ("cpu-limit=1e99%", "from 1%"),
    ] { #expect(complaint("--disk", "path=a,\(value)")?.contains(hint) == true, "\(value)") }
    #expect(complaint("--disk", "vhost_user=on,socket=s,cpu-limit=5%")?.contains("where it is started") == true)
    #expect(complaint("--disk", "path=a,cpulimit=5%")?.contains("'cpu-limit'") == true)
    #expect(complaint("--disk", "path=a,memory-limit=528M") == nil)
    #expect(complaint("--console", "tty,null") != nil && complaint("--console", "cpu-limit=5%") != nil)
  }

  @Test func automaticIDsKeepClearOfGivenOnes() throws {
    let vm = try parse("--kernel", "k", "--disk", "path=a", "path=b,id=blk0", "--net", "tap=t0")
    #expect(vm.disks.map(\.id) == ["blk1", "blk0"])
    #expect(vm.nets.map(\.id) == ["net0"])
  }

  @Test func quotesAndBracketsProtectCommas() throws {
    let vm = try parse(
      "--kernel", "k", "--disk", "path=\"a,b=\"\"c\"\".img\",id=d",
      "--generic-vhost-user", "socket=s,device_type=fs,queue_sizes=[64,128]")
    #expect(vm.disks[0].source == .image(path: "a,b=\"c\".img", readOnly: false))
    #expect(vm.generics[0].queueSizes == [64, 128])
    #expect(vm.generics[0].deviceType == .fileSystem)
    #expect(vm.generics[0].id == "fs0")
  }

  @Test func backEndsStartedByHandAreNamedBySocket() throws {
    let vm = try parse(
      "--kernel", "k", "--disk", "vhost_user=on,socket=b.sock,num_queues=2", "--net", "vhost_user=on,socket=n.sock",
      "--generic-vhost-user", "socket=g.sock,device_type=0x1a,queue_sizes=[2]")
    #expect(vm.disks[0].source == .external(.socket("b.sock")))
    #expect(vm.disks[0].queueCount == 2)
    #expect(vm.nets[0].source == .external(.socket("n.sock")))
    #expect(vm.generics[0].deviceType.rawValue == 26)
  }

  @Test func entropyComesFromUrandomUnlessSaidOtherwise() throws {
    #expect(try parse("--kernel", "k").entropy == nil)
    #expect(try parse("--kernel", "k", "--rng", "on").entropy?.source == "/dev/urandom")
    let vm = try parse("--kernel", "k", "--rng", "src=/dev/random,on-death=stop-vm")
    #expect(vm.entropy?.source == "/dev/random")
    #expect(vm.entropy?.id == "rng0")
    #expect(vm.deathPolicy(of: "rng0").action == .stopVM)
    #expect(vm.deviceCount == 2)
    #expect(throws: ConfigurationError.self) { try parse("--kernel", "k", "--rng", "on,src=/dev/random") }
    #expect(throws: ConfigurationError.self) { try parse("--kernel", "k", "--rng", "off") }
    #expect(throws: ConfigurationError.self) { try parse("--kernel", "k", "--rng", "on", "--rng", "on") }
  }

  @Test func fileSystemsHaveTagAndSocketOfTheirOwn() throws {
    let vm = try parse("--kernel", "k", "--fs", "tag=home,socket=a", "tag=data,socket=b,num_queues=2,queue_size=256,id=d")
    #expect(vm.fileSystems.map(\.id) == ["fs0", "d"])
    let jailed = try parse(
      "--kernel", "k", "--memory", "size=64M", "--fs", "tag=home,path=/srv,jail=v,program=\"v --fd={listen}\",cpu-limit=50%,memory-limit=1G"
    )
    #expect(jailed.fileSystems[0].source == .program(.init(words: ["v", "--fd={listen}"], profile: "v", path: "/srv")))
    #expect(jailed.limits(of: "fs0").processorPercent == 50 && jailed.limits(of: "fs0").memory == 1 << 30)
    for words in ["tag=a,socket=a,cpu-limit=50%", "tag=a", "tag=a,socket=a,program=\"v {fd}\",jail=v", "tag=a,program=\"v {fd}\""] {
      #expect(throws: ConfigurationError.self) { try parse("--kernel", "k", "--fs", words) }
    }
    #expect(vm.fileSystems[0].queueCount == 1 && vm.fileSystems[0].queueSize == 1024)
    #expect(vm.fileSystems[1].queueCount == 2 && vm.fileSystems[1].queueSize == 256)
    #expect(vm.externalSocket(of: "d") == "b")
    for words in [
      "tag=home", "socket=a", "tag=,socket=a", "tag=\(String(repeating: "x", count: 37)),socket=a",
      "tag=a,socket=a,num_queues=256", "tag=a,socket=a,queue_size=100",
    ] {
      #expect(throws: ConfigurationError.self) { try parse("--kernel", "k", "--fs", words) }
    }
    #expect(throws: ConfigurationError.self) { try parse("--kernel", "k", "--fs", "tag=a,socket=a", "tag=a,socket=b") }
    #expect(throws: ConfigurationError.self) { try parse("--kernel", "k", "--fs", "tag=a,socket=a", "tag=b,socket=a") }
  }

  @Test func backEndsToStartAreNamedByProgramAndJail() throws {
    let vm = try parse(
      "--kernel", "k", "--disk", "vhost_user=on,path=d.img,jail=p.jail,program=\"qsd --blockdev 'a b={path}' {listen}\"",
      "--generic-vhost-user", "device_type=fs,queue_sizes=[128],path=/srv,jail=v.jail,program=\"vfs --fd={fd}\"")
    #expect(
      vm.disks[0].source
        == .external(.program(.init(words: ["qsd", "--blockdev", "a b={path}", "{listen}"], profile: "p.jail", path: "d.img"))))
    guard case .program(let program) = vm.generics[0].source else {
      Issue.record("no program")
      return
    }
    #expect(program.convention == .connected && program.words == ["vfs", "--fd={fd}"] && program.path == "/srv")
  }

  @Test(arguments: [
    ("vhost_user=on,program=\"x {fd}\"", "lacks 'jail='"),
    ("vhost_user=on,jail=p,program=\"x\"", "exactly one of {listen}, {fd} and {socket}"),
    ("vhost_user=on,jail=p,program=\"x {fd} {socket}\"", "exactly one of"),
    ("vhost_user=on,jail=p,program=\"x {fd} {path}\"", "lacks 'path='"),
    ("vhost_user=on,jail=p,program=\"x '{fd}\"", "'single quotes'"), ("vhost_user=on,socket=s,jail=p", "goes with program="),
    ("vhost_user=on,socket=s,jail=p,program=\"x {fd}\"", "exclude each other"), ("path=d,program=\"x {fd}\"", "add vhost_user=on"),
    ("vhost_user=on,jail=p,program=\"x {fd}\",readonly=on", "the back end decides it"),
  ])
  func backEndsToStartWantAJailAndOneWayToTheirSocket(_ text: String, _ part: String) {
    #expect(complaint("--disk", text)?.contains(part) == true, "\(complaint("--disk", text) ?? "accepted")")
  }

  @Test(arguments: [
    ("tty", VMConfiguration.Terminal.tty), ("pty", .pty), ("null", .null), ("off", .off), ("file=/x", .file("/x")),
    ("socket=/s", .socket("/s")),
  ])
  func consoleWords(_ text: String, _ terminal: VMConfiguration.Terminal) throws {
    #expect(try parse("--kernel", "k", "--console", text).console == terminal)
  }

  @Test func theConsoleHasAPolicyAsAnyDevice() throws {
    let vm = try parse("--kernel", "k", "--console", "file=out,on-death=hold,restart-limit=7")
    #expect(vm.console == .file("out"))
    #expect(vm.deathPolicy(of: "con0").action == .hold && vm.deathPolicy(of: "con0").limit == 7)
    #expect(try parse("--kernel", "k").deathPolicy(of: "con0").action == .restart)
    #expect(complaint("--console", "tty,pty") != nil)
  }

  @Test func serialTakesTheTerminalFromTheConsoleUnlessBothAskForIt() throws {
    let vm = try parse("--kernel", "k", "--serial", "tty")
    #expect(vm.console == .null)
    #expect(complaint("--serial", "tty", "--console", "tty")?.hasPrefix("--console tty and --serial tty exclude") == true)
  }

  @Test(arguments: [
    ("512M", 512 << 20 as UInt64), ("1G", 1 << 30), ("2T", 2 << 40), ("4194304", 4 << 20), ("4096K", 4 << 20),
    ("0x800000", 8 << 20),
  ])
  func sizes(_ text: String, _ bytes: UInt64) throws {
    #expect(try parse("--kernel", "k", "--memory", "size=\(text)").memorySize == bytes)
  }

  @Test(arguments: ["0", "1", "4097K1", "-1G", "1.5G", "99999999999999T", "64T", "1048577", "G", ""])
  func absurdMemoryIsRefusedWithTheRange(_ text: String) {
    #expect(
      complaint("--memory", "size=\(text)")
        == "Value '\(text)' does not fit --memory size; it wants a multiple of 4K from 4M to 8T")
  }

  @Test(arguments: ["0", "255", "-1", "many", "", "99999999999999999999"])
  func absurdProcessorCountsAreRefusedWithTheRange(_ text: String) {
    #expect(complaint("--cpus", "boot=\(text)") == "Value '\(text)' does not fit --cpus boot; it wants a number from 1 to 254")
  }

  @Test(arguments: [
    ("--dsik", "--disk"), ("--kernal", "--kernel"), ("--mem", "--memory"), ("--command-line", "--cmdline"),
    ("--Console", "--console"), ("--initrd", "--initramfs"), ("--no-reset", "--no-reboot"),
  ])
  func unknownOptionNamesTheNearest(_ wrong: String, _ right: String) {
    #expect(complaint(wrong, "x") == "Unknown option \(wrong); did you mean \(right)?")
  }

  @Test func optionLikeNothingPointsToHelp() {
    #expect(complaint("--zzzzzzzz") == "Unknown option --zzzzzzzz; martlet run --help lists the options")
  }

  @Test func aDiskSaysHowItsBackEndIsToServe() throws {
    let vm = try VMConfiguration(arguments: [
      "--kernel", "k", "--cpus", "boot=3", "--disk",
      "path=a,direct=on,aio=threads,block_size=4096,poll=20,cache_map=off,bw_size=1M,bw_refill_time=100,ops_size=500,ops_one_time_burst=9,ops_refill_time=1000",
      "--disk", "path=b,readonly=on,force_share=on,registered=on,num_queues=1,queue_size=1024,packed=off,indirect_desc=off",
    ])
    #expect(
      vm.disks[0].backEndArguments == [
        "--direct", "--cache-map=off", "--aio=threads", "--block-size=4096", "--poll=20", "--bw-size=1048576", "--bw-refill-time=100",
        "--ops-size=500", "--ops-one-time-burst=9", "--ops-refill-time=1000",
      ])
    #expect(vm.disks[0].queueCount == 3 && vm.disks[1].queueCount == 1 && vm.disks[1].queueSize == 1024)
    #expect(
      vm.disks[1].isShared && vm.disks[1].backEndArguments == ["--force-share", "--registered-file", "--ring-without=packed,indirect_desc"])
  }

  @Test(arguments: [
    ("path=a,aio=uring", "aio"), ("path=a,block_size=1024", "block_size"), ("path=a,poll=0", "poll"),
    ("path=a,bw_size=1", "bw_refill_time"),
    ("path=a,ops_refill_time=5", "ops_size"), ("path=a,force_share=on", "readonly=on"), ("path=a,queue_size=2048", "1024"),
    ("vhost_user=on,socket=s,direct=on", "our own back end"),
  ])
  func whatADiskCannotBeIsSaid(_ disk: String, _ part: String) {
    #expect((complaint("--disk", disk) ?? "accepted").contains(part))
  }

  @Test func unknownKeyNamesTheNearestAndTheOthers() {
    let known = "It knows path, readonly, format, id, serial, num_queues, queue_size, direct, aio, "
    let sentence = complaint("--disk", "path=a,read_only=on") ?? ""
    #expect(sentence.hasPrefix("Unknown key 'read_only' in --disk; did you mean 'readonly'? " + known))
    #expect(complaint("--cpus", "bot=1") == "Unknown key 'bot' in --cpus; did you mean 'boot'? It knows boot")
    #expect(complaint("--net", "zzzzzz=1")?.hasPrefix("Unknown key 'zzzzzz' in --net; it knows tap, mac") == true)
  }

  @Test func bareWordsAreExplained() {
    #expect(complaint("--disk", "a.img") == "Option --disk does not understand 'a.img'; write for example --disk path=root.img")
    #expect(complaint("--console", "tyt") == "Option --console does not understand 'tyt'; did you mean 'tty'?")
    #expect(complaint("--console", "tty,pty")?.contains("one of tty, pty") == true)
  }

  @Test func sameIDTwiceNamesBothPlaces() {
    #expect(
      complaint("--disk", "path=a,id=x", "--net", "tap=t,id=x")
        == "Two devices have the id 'x' (--disk number 1 and --net number 1); give one of them another id=")
    #expect(complaint("--disk", "path=a,id=con0")?.contains("the console and --disk number 1") == true)
  }

  @Test func oneThingForTwoUsesIsRefused() {
    #expect(complaint("--disk", "path=a", "path=a")?.contains("disk blk0 and disk blk1 (both a) exclude") == true)
    #expect(complaint("--disk", "path=a,readonly=on", "path=a,readonly=on") == nil)
    #expect(complaint("--net", "tap=t", "tap=t")?.contains("(both t)") == true)
    #expect(complaint("--control", "s", "--console", "socket=s")?.contains("(both s)") == true)
  }

  @Test(arguments: [
    (["--disk"], "Option --disk wants a value; write for example --disk path=root.img"),
    (["--cpus", "--name", "x"], "Option --cpus wants a value; write for example --cpus boot=2"),
    (["stray"], "Argument 'stray' belongs to no option; martlet run --help lists the options"),
    (["--name", "a", "b"], "Argument 'b' belongs to no option; martlet run --help lists the options"),
    (["--no-reboot=on"], "Option --no-reboot takes no value; leave out 'on'"),
    (["--kernel", "again"], "Option --kernel is given twice; leave one out"),
    (["--disk", "path=a,path=b"], "Key 'path' is given twice in one --disk; leave one out"),
    (["--disk", "readonly=on"], "Option --disk lacks 'path='; write for example --disk path=root.img"),
    (["--disk", "path=a,readonly=yes"], "Value 'yes' does not fit --disk readonly; it wants on or off"),
    (["--disk", "path=\"a"], "A quote or bracket is not closed in --disk 'path=\"a'; close it"),
    (["--disk", "vhost_user=on"], "Option --disk lacks 'socket='; write for example --disk vhost_user=on,socket=backend.sock"),
    (["--name", "a/b"], "Value 'a/b' does not fit --name; it wants \(VMConfiguration.nameRule)"),
    (["--net", "tap=a/b"], "Value 'a/b' does not fit --net tap; it wants an interface name of 1 to 15 characters"),
  ])
  func everyRefusalIsOneLine(_ arguments: [String], _ line: String) {
    do throws(ConfigurationError) {
      _ = try VMConfiguration(arguments: ["--kernel", "k"] + arguments)
      Issue.record("accepted \(arguments)")
    } catch {
      #expect(error.message == line)
      #expect(!error.message.contains("\n"))
    }
  }

  @Test(arguments: ["01:00:00:00:00:01", "00:00:00:00:00:00", "52:54:00:12:34", "52:54:00:12:34:5", "xx:54:00:12:34:56"])
  func badMACIsRefused(_ text: String) { #expect(complaint("--net", "tap=t,mac=\(text)")?.contains("unicast") == true) }

  @Test func missingKernelIsNamed() {
    #expect(throws: ConfigurationError.missingOption("kernel", example: "--kernel bzImage")) { try parse("--name", "x") }
  }

  @Test func thirtyOneDevicesAreTooMany() {
    let disks = (0..<31).flatMap { ["--disk", "path=\($0)"] }
    #expect(throws: ConfigurationError.tooMany(what: "devices", count: 32, limit: 31)) {
      try VMConfiguration(arguments: ["--kernel", "k"] + disks)
    }
  }

  @Test(arguments: ["[1]", "[2,3]", "[]", "64", "[64", "[65536]", "[2-4000000000]"])
  func badQueueSizesAreRefused(_ text: String) {
    #expect(complaint("--generic-vhost-user", "socket=s,device_type=fs,queue_sizes=\(text)") != nil)
  }

  @Test func numberListsKnowRanges() {
    #expect(ListGrammar.numbers(of: "[1,3-5]", limit: 8) == [1, 3, 4, 5])
    #expect(ListGrammar.numbers(of: "[0-18446744073709551615]", limit: 8) == nil)
    #expect(ListGrammar.items(of: "[0@[1,2],1@[3]]") == ["0@[1,2]", "1@[3]"])
  }

  @Test func helpNamesEveryOptionAndKey() {
    let text = HelpText.render(usage: "u", intro: "i", table: VMConfiguration.optionTable)
    for option in VMConfiguration.optionTable.options {
      #expect(text.contains("--\(option.name) "))
      if case .list(let keys, let words) = option.shape {
        for key in keys { #expect(text.contains("\(key.name)=\(key.value)")) }
        for word in words { #expect(text.contains("  \(word.name)")) }
      }
    }
    #expect(text.split(separator: "\n").allSatisfy { $0.count <= 120 })
  }

  @Test func everyExampleInTheTableIsAccepted() throws {
    for option in VMConfiguration.optionTable.options where option.name != "cmdline" {
      let words = option.example.split(separator: " ").map(String.init)
      let kernel = option.name == "kernel" ? [] : ["--kernel", "k"]
      _ = try VMConfiguration(arguments: kernel + words)
    }
  }

  @Test func editDistanceCountsSwapsAsOne() {
    #expect(EditDistance.between("disk", "dsik") == 1)
    #expect(EditDistance.between("", "abc") == 3)
    #expect(EditDistance.between("kitten", "sitting") == 3)
  }
}
