import ControlProtocol
import Foundation
import Glibc
import HostSystem
import Sandbox
import TestSupport
import Testing

/// `martlet ctl upgrade-supervisor`, with a core and devices of straw.
@Suite(.enabled(if: Installation.canRun, "These tests open /dev/kvm and need the built programs."))
struct UpgradeTests {
  private func start(_ home: Installation, _ arguments: [String] = []) throws -> RunningProgram {
    let vm = try home.start(["--disk", "path=disk.img,restart-limit=1000", "--control", "ctl", "--console", "socket=con"] + arguments)
    try home.waitUntilRunning()
    return vm
  }

  @Test func tenUpgradesKeepTheVMAndItsCare() throws {
    let home = try Installation()
    let vm = try start(home)
    let before = home.members
    let supervisor = try #require(before["supervisor"])
    let count = settled { Installation.descriptorCount(supervisor) }
    var guardians: Set<Int32> = []
    var spawners: Set<Int32> = []
    for round in 1...10 {
      try home.installSupervisor(BuiltPrograms.path("martlet-supervisor"))
      let answer = try home.ctl("upgrade-supervisor", "--json")
      #expect(answer.code == 0, "\(answer.errors) \(vm.errorText)")
      #expect(try home.number("upgrades") == UInt64(round))
      let now = home.members
      #expect(now["supervisor"] == supervisor)
      #expect(now["core"] == before["core"])
      guardians.insert(try #require(now["guardian"]))
      spawners.insert(try #require(now["spawner"]))
      let victim = try #require(now["blk0"])
      kill(victim, SIGKILL)
      home.waitUntil("the disk's next process") { vm.errorText.components(separatedBy: "Device blk0 is served again").count > round }
      #expect(try home.ctl("pause").code == 0)
      #expect(try home.ctl("resume").code == 0)
      #expect(try home.ctl("stats", "blk0").code == 0)
      // One control connection may still be on its way out.
      home.waitUntil("as many descriptors as before: \(Installation.descriptorCount(supervisor)), not \(count)") {
        Installation.descriptorCount(supervisor) == count
      }
      #expect(home.members.count == before.count, "\(home.members)")
    }
    #expect(guardians.count == 10 && spawners.count == 10)
    #expect(home.status(supervisor, "Seccomp_filters") == "1")
    let owned = geteuid() == 0
    if owned { #expect(home.status(supervisor, "CapPrm") == "0000000000000020") }
    let devices = try home.ctl("devices", "--json").output
    #expect(devices.contains("\"restarts\":10"), "\(devices)")
    try home.expectImageIsOwned()
    #expect(try home.ctl("events", "--json").output.contains("\"upgraded\""))
    #expect(try home.ctl("shutdown").code == 0)
    #expect(vm.wait().code == 0, "\(vm.errorText)")
    home.expectNothingLeft()
  }

  @Test func whoeverIsConnectedStaysConnected() throws {
    let home = try Installation()
    try home.expectClientsStay(try start(home))
  }

  @Test(arguments: [
    ("up-crash", "was killed by signal 11 before it said"), ("up-refuse", "It reads states of version 9"),
    ("up-silent", "exited with code 0 before it said"), ("up-hang", "does not say within 700 ms"), ("up-call", "getppid"),
    ("up-half", "its spawner ended before it was ready"),
  ])
  func aProgramThatCannotTakeOverChangesNothing(_ name: String, _ sentence: String) throws {
    let home = try Installation()
    let vm = try start(home, ["--name", name, "--deadline", "ready=\(name == "up-hang" ? 700 : 20000)"])
    let before = home.members
    let supervisor = try #require(before["supervisor"])
    let count = settled { Installation.descriptorCount(supervisor) }
    try home.installSupervisor(BuiltPrograms.path("martlet-fake"))
    var answer = try home.ctl("upgrade-supervisor")
    // The kernel leaves out audit records when many come at once, and then nobody can know which call it was.
    for _ in 0..<20 where name == "up-call" && geteuid() == 0 && answer.errors.contains("calls a system call when") {
      usleep(500_000)
      answer = try home.ctl("upgrade-supervisor")
    }
    #expect(answer.code == 1)
    if name != "up-call" || geteuid() == 0 { #expect(answer.errors.contains(sentence), "\(answer.errors)") }
    #expect(answer.errors.contains("Not upgraded, and nothing has changed"), "\(answer.errors)")
    home.waitUntil("the processes of before: \(home.members)") { home.members == before }
    home.waitUntil("descriptors") { Installation.descriptorCount(before["supervisor"] ?? 0) == count }
    #expect(try home.number("upgrades") == 0)
    // The old supervisor and its spawner work as ever, and a good program can still take over.
    kill(try #require(before["blk0"]), SIGKILL)
    home.waitUntil("the disk's next process") { vm.errorText.contains("Device blk0 is served again") }
    try home.installSupervisor(BuiltPrograms.path("martlet-supervisor"))
    let second = try home.ctl("upgrade-supervisor")
    #expect(second.code == 0, "\(second.errors)")
    vm.signal(SIGTERM)
    #expect(vm.wait().code == 143)
    home.expectNothingLeft()
  }

  @Test func noProgramAndATrialChangeNothing() throws {
    let home = try Installation()
    let vm = try start(home)
    let before = home.members
    #expect(try home.ctl("upgrade-supervisor", "--dry-run").code == 0)
    #expect(home.members == before)
    try home.installSupervisor("kernel")
    for arguments in [[], ["--dry-run"]] {
      let answer = try RunningProgram(
        home.directory + "/martlet", ["ctl", "--control", "ctl", "upgrade-supervisor"] + arguments, directory: home.directory
      ).wait()
      #expect(answer.code == 1 && answer.errors.contains("martlet-supervisor"), "\(answer.errors)")
    }
    _ = try home.shell("rm martlet-supervisor")
    let gone = try home.ctl("upgrade-supervisor")
    #expect(gone.code == 1 && gone.errors.contains("martlet-supervisor"), "\(gone.errors)")
    #expect(try home.number("upgrades") == 0)
    vm.signal(SIGTERM)
    #expect(vm.wait().code == 143)
    home.expectNothingLeft()
  }

  /// Killed while the new program is asked, right after it has taken over, and at some moment in between.
  @Test(arguments: ["asked", "after", "any"]) func killedSupervisorLeavesNothing(_ moment: String) throws {
    for _ in 0..<(moment == "any" ? 5 : 1) {
      let home = try Installation()
      let vm = try start(home, ["--name", moment == "asked" ? "up-hang" : "up", "--deadline", "ready=20000"])
      if moment == "asked" {
        let before = home.members.count
        try home.installSupervisor(BuiltPrograms.path("martlet-fake"))
        let asker = try RunningProgram(
          home.directory + "/martlet", ["ctl", "--control", "ctl", "upgrade-supervisor"], directory: home.directory)
        home.waitUntil("the program that is asked") { home.members["martlet-supervisor"] != nil && home.members.count > before }
        vm.signal(SIGKILL)
        #expect(asker.wait().code != 0)
      } else {
        let asker = try RunningProgram(
          home.directory + "/martlet", ["ctl", "--control", "ctl", "upgrade-supervisor"], directory: home.directory)
        if moment == "after" { #expect(asker.wait().code == 0) } else { usleep(.random(in: 0...40_000)) }
        vm.signal(SIGKILL)
        _ = asker.wait()
      }
      #expect(vm.wait().signal == SIGKILL)
      home.expectNothingLeft()
    }
  }

  /// Devices that were added, removed and given other images since the start, and what only the spawner has of them.
  @Test(arguments: [SIGTERM, SIGKILL]) func whatHasChangedIsHandedOn(_ end: Int32) throws {
    let home = try Installation()
    let vm = try start(home, ["--rng", "on"])
    #expect(try home.shell("truncate -s 1M more.img other.img").code == 0)
    func succeed(_ words: String) throws {
      let result = try home.shell("./martlet ctl --control ctl \(words)")
      #expect(result.code == 0, "\(words): \(result.errors) \(vm.errorText)")
    }
    func isOwned(_ image: String) throws -> Bool {
      let lock = "import fcntl, struct; fcntl.fcntl(open('\(image)', 'r+'), 37, struct.pack('hhqqi', fcntl.F_WRLCK, 0, 1 << 62, 0, 0))"
      return try home.shell("python3 -c \"\(lock)\"").errors.contains("Resource temporarily unavailable")
    }
    func devices() throws -> [String] {
      try JSONValue(parsing: try home.ctl("devices", "--json").output)["devices"]?.array?.compactMap { $0["id"]?.string } ?? []
    }
    for words in ["add disk path=more.img,id=more", "add console socket=late,id=late", "remove rng0", "replace blk0 --path other.img"] {
      try succeed(words)
    }
    let before = try devices()
    #expect(Set(before).isSuperset(of: ["blk0", "more", "late"]) && !before.contains("rng0"), "\(before)")
    for round in 1...2 {
      try succeed("upgrade-supervisor")
      #expect(try devices() == before)
      for id in ["blk0", "more", "late"] {
        kill(try #require(home.members[id]), SIGKILL)
        home.waitUntil("\(id)") { vm.errorText.components(separatedBy: "Device \(id) is served again").count > round }
      }
      #expect(try isOwned("other.img") && isOwned("more.img"))
      #expect(try !isOwned("disk.img"))
      #expect(access(home.directory + "/late", F_OK) == 0)
    }
    try succeed("remove more")
    #expect(try !isOwned("more.img"))
    for words in ["add disk path=more.img", "replace blk0 --path disk.img", "upgrade", "upgrade-supervisor --dry-run"] {
      try succeed(words)
    }
    #expect(try home.number("upgrades") == 3)
    #expect(try isOwned("more.img") && isOwned("disk.img"))
    #expect(try !isOwned("other.img"))
    vm.signal(end)
    let outcome = vm.wait()
    #expect(end == SIGKILL ? outcome.signal == SIGKILL : outcome.code == 143)
    home.waitUntil("the socket's end") { access(home.directory + "/late", F_OK) != 0 }
    home.expectNothingLeft()
  }

  @Test func withoutASandboxThereIsNobodyToHelp() throws {
    let home = try Installation()
    let vm = try start(home, ["--sandbox", "off"])
    let answer = try home.ctl("upgrade-supervisor")
    #expect(answer.code == 1 && answer.errors.contains("--sandbox off"), "\(answer.errors)")
    vm.signal(SIGTERM)
    #expect(vm.wait().code == 143)
    home.expectNothingLeft()
  }

  /// A state is somebody else's bytes: what the real program says to one of another version, a cut one, an altered one.
  @Test func foreignStatesAreRefusedWithTheReason() throws {
    let home = try Installation()
    let vm = try start(home, ["--name", "up-hang", "--deadline", "ready=20000"])
    try home.installSupervisor(BuiltPrograms.path("martlet-fake"))
    let asker = try RunningProgram(
      home.directory + "/martlet", ["ctl", "--control", "ctl", "upgrade-supervisor"], directory: home.directory)
    home.waitUntil("the program that is asked") { home.members["martlet-supervisor"] != nil }
    let examined = try #require(home.members["martlet-supervisor"])
    let copy = try home.shell("cp /proc/\(examined)/fd/3 state")
    #expect(copy.code == 0, "\(copy.errors)")
    vm.signal(SIGKILL)
    _ = vm.wait()
    #expect(asker.wait().code != 0)
    let script = """
      import os, random, subprocess, sys
      def ask(state):
          fd = os.memfd_create("state", 0); os.write(fd, state); os.lseek(fd, 0, 0)
          run = subprocess.run([sys.argv[1], "--martlet-upgrade=examine"], stdout=subprocess.PIPE, stderr=subprocess.PIPE,
              close_fds=False, preexec_fn=lambda: os.dup2(fd, 3, True))
          os.close(fd)
          assert run.returncode in (0, 1), (run.returncode, run.stderr)
          assert run.stdout.endswith(b"\\n"), run.stdout
          assert (run.stdout == b"state accepted\\n") == (run.returncode == 0), run.stdout
          return run.stdout.decode()
      state = open("state", "rb").read()
      def expect(words, changed):
          answer = ask(changed)
          assert words in answer, answer
      expect("state accepted", state)
      expect("writes version 9", state[:4] + b"\\x09" + state[5:])
      expect("speaks version 9", state[:6] + b"\\x09" + state[7:])
      expect("magic", b"X" + state[1:])
      expect("1 bytes too many", state + b"\\0")
      expect("the system call epoll_create1", state.replace(b"\\x23\\x01\\0\\0\\0\\0\\0\\0", b"\\x24\\x01\\0\\0\\0\\0\\0\\0"))
      expect("does not understand this VM's command line", state.replace(b"--control", b"--cuntrol"))
      for length in range(0, len(state), max(1, len(state) // 40)):
          expect("The state is broken", state[:length])
      chance = random.Random(1)
      for _ in range(150):
          place = chance.randrange(8, len(state))
          ask(state[:place] + bytes([state[place] ^ (1 << chance.randrange(8))]) + state[place + 1:])
      """
    let program = BuiltPrograms.path("martlet-supervisor")
    let result = try RunningProgram("/usr/bin/env", ["python3", "-c", script, program], directory: home.directory).wait(seconds: 120)
    #expect(result.code == 0, "\(result.errors)")
  }
}
